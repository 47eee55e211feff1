"""A decoder's weights as they lie on the device: what is read from a source, module by module."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource


@dataclass(frozen=True)
class Linear:
    """A fused matrix: weight [out, in], E4M3 codes where there is a scale [out]; bias [out] or None."""

    name: str
    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def is_fp8(self) -> bool:
        """Whether it is multiplied in E4M3."""
        return self.scale is not None


@dataclass(frozen=True)
class Layer:
    """One decoder layer. qk_norms: [2, head_dim], of q and of k."""

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    qk_norms: torch.Tensor | None
    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear

    @property
    def matrices(self) -> tuple[Linear, ...]:
        """In the order in which they are used."""
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class DecoderWeights:
    """All of a decoder, or one rank's part of it.

    embedding: [vocab_size, hidden_size]. norm: [hidden_size]. head: of a rank's vocab_width tokens. cos and sin:
    [max_seq_len, head_dim / 2].
    """

    embedding: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    head: Linear
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def load(
        cls,
        shape: DecoderShape,
        source: WeightSource,
        device: torch.device,
        dtype: torch.dtype,
        split: ShardedDecoder | None = None,
    ) -> DecoderWeights:
        """Read `source`, a `SplitWeights` where there is a split; whatever isn't FP8 or a table becomes `dtype`."""

        def load(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            tensor = source.load(name, device)
            return tensor if dtype is None else tensor.to(dtype)

        def linear(name: str) -> Linear:
            scale = load(f"{name}.scale") if f"{name}.scale" in source.entries else None
            bias = load(f"{name}.bias") if f"{name}.bias" in source.entries else None
            weight = load(f"{name}.weight", dtype if scale is None else None)
            return Linear(name.rsplit(".", 1)[-1], weight, scale, bias)

        def layer(prefix: str) -> Layer:
            norms = None
            if shape.qk_norm:
                norms = torch.stack([load(f"{prefix}q_norm", dtype), load(f"{prefix}k_norm", dtype)])
            matrices = [linear(prefix + matrix) for matrix in shape.matrices]
            return Layer(load(f"{prefix}attention_norm"), load(f"{prefix}mlp_norm"), norms, *matrices)

        embedding = load("embedding", dtype)
        layers = [layer(f"layers.{i}.") for i in range(shape.num_layers)]
        head = embedding if shape.tie_word_embeddings else load("head", dtype)
        if split is not None:
            if shape.tie_word_embeddings:
                head = embedding[split.vocab_rows]
            if missing := split.vocab_width - len(head):  # at the vocabulary's end
                head = torch.nn.functional.pad(head, (0, 0, 0, missing))
        return cls(
            embedding, layers, load("norm"), Linear("head", head, None, None), load("rope.cos"), load("rope.sin")
        )
