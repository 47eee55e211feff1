"""A decoder's weights on the device, as its layers' parts read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.engine.runners.cuda.linear import DeviceLinear
from deepseek_triton.ensemble.engine.runners.cuda.parts import PARTS
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightLoader, WeightSource


@dataclass(frozen=True)
class Layer:
    """One decoder layer: the weights of its parts, as their `CudaPart.load` gives them."""

    attention: Any
    mlp: Any

    @property
    def has_gemv(self) -> bool:
        """Whether matrix-vector kernels can compute it: shared experts are in the stacks, and rows have one scale."""
        return getattr(self.mlp, "shared", None) is None and not any(linear.num_blocks for linear in self.matrices)

    @property
    def matrices(self) -> tuple[DeviceLinear, ...]:
        """The matrices in the order in which they are used."""
        return *self.attention.matrices, *self.mlp.matrices


@dataclass(frozen=True)
class DecoderWeights:
    """The weights of a decoder, or one rank's share of them.

    embedding: [vocab_size, hidden_size]. norm: [hidden_size]. head: [vocab_size, hidden_size], of a rank [vocab_width,
    hidden_size]. cos and sin: [max_seq_len, rotary_dim / 2] float32.
    """

    embedding: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    head: DeviceLinear
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
        """Read `source`, a `SplitWeights` where there is a split; matrices that aren't FP8 are converted to `dtype`."""
        loader = WeightLoader(source, device, dtype)

        def layer(index: int) -> Layer:
            own = loader.under(f"layers.{index}.")
            return Layer(*(PARTS[type(part)].load(own, part) for part in shape.parts(index)))

        embedding = loader.tensor("embedding", dtype)
        layers = [layer(index) for index in range(shape.num_layers)]
        head = embedding if shape.tie_word_embeddings else loader.tensor("head", dtype)
        if split is not None:
            if shape.tie_word_embeddings:
                head = embedding[split.vocab_rows]
            if missing := split.vocab_width - len(head):  # the last ranks' rows are padded
                head = torch.nn.functional.pad(head, (0, 0, 0, missing))
        norm, cos, sin = (loader.tensor(name) for name in ("norm", "rope.cos", "rope.sin"))
        return cls(embedding, layers, norm, DeviceLinear("head", head, None, None), cos, sin)
