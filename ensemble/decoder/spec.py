"""ModelSpec: every dimension and option of a decoder-only transformer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.errors import SpecError
from deepseek_triton.ensemble.decoder.options import ExpertOptions, IndexerOptions, LatentOptions
from deepseek_triton.ensemble.decoder.part import Norm, Part, Plain, Tap
from deepseek_triton.ensemble.decoder.rope import RopeSpec

MAX_NUM_LAYERS = 1024  # far more than any model has: a corrupt file must not make billions of names


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: dimensions in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    o_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    rope: RopeSpec = field(default_factory=RopeSpec)
    latent: LatentOptions | None = None
    experts: ExpertOptions | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name} is {value!r}, must be a positive whole number")
        if self.num_layers > MAX_NUM_LAYERS:
            raise SpecError(f"num_layers is {self.num_layers}, must be at most {MAX_NUM_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise SpecError(f"num_heads is {self.num_heads}, must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.latent is None and self.head_dim % 2:
            raise SpecError(f"head_dim is {self.head_dim}, must be even for rotary embedding")
        if self.rope.scaling == "dynamic" and self.head_dim < 4:  # its exponent is head_dim / (head_dim - 2)
            raise SpecError(f"head_dim is {self.head_dim}, dynamic rope scaling needs at least 4")
        if not 0 < self.rms_norm_eps < 1:
            raise SpecError(f"rms_norm_eps is {self.rms_norm_eps}, must lie between 0 and 1")
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise SpecError(f"eos_token_id is {token}, outside the vocabulary of {self.vocab_size}")
        if self.rope.frequency_factors and len(self.rope.frequency_factors) != self.rotary_dim // 2:
            raise SpecError(
                f"rope_freqs.weight holds {len(self.rope.frequency_factors)} factors, head_dim {self.rotary_dim} needs "
                f"{self.rotary_dim // 2}"
            )

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that get a rotary embedding."""
        return self.head_dim if self.latent is None else self.latent.qk_rope_head_dim

    @property
    def max_seq_len(self) -> int:
        """The longest sequence in tokens: max_position_embeddings, or that to which its scaling stretches the rope."""
        if self.rope.scaling == "dynamic":
            return int(self.max_position_embeddings * self.rope.factor)
        if self.rope.scaling == "yarn":  # whose files often leave max_position_embeddings at the original length
            stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings

    @property
    def indexer(self) -> IndexerOptions | None:
        """The indexer of latent attention; None: every earlier token is attended to."""
        return None if self.latent is None else self.latent.indexer

    def for_length(self, max_seq_len: int) -> ModelSpec:
        """The decoder for sequences of so many tokens at most: without an indexer that would choose all of them."""
        if self.latent is None or self.indexer is None or max_seq_len > self.indexer.topk:
            return self
        return replace(self, latent=replace(self.latent, indexer=None))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the manifest stores them."""
        return asdict(self)

    def num_parameters(self) -> int:
        """Elements in all tensors of `tensor_shapes`."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def parts(self, layer: int) -> tuple[Part, ...]:
        """The parts of one layer, in the order in which they are computed."""
        return ARCHITECTURES[self.architecture].parts(self, layer)

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name, without the layer's prefix, and shape of each of a layer's tensors, as the graph reads them."""
        return part_shapes(self.parts(layer))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the checkpoint must hold, Hugging Face's names, linear layers [out, in]."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            shapes |= {layer_prefix(layer) + name: shape for name, shape in self.layer_shapes(layer).items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def taps(self, layer: int) -> tuple[Tap, ...]:
        """The values that a layer's linear layers read."""
        return tuple(tap for part in self.parts(layer) for tap in part.taps)

    def cache_elements(self) -> int:
        """Elements of one token in the caches of all layers."""
        return sum(
            tensor.elements for layer in range(self.num_layers) for part in self.parts(layer) for tensor in part.cache
        )


def part_shapes(parts: Iterable[Part]) -> dict[str, tuple[int, ...]]:
    """Name, without the layer's prefix, and shape of each tensor of a layer's parts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in (module for part in parts for module in part.modules):
        if isinstance(module, Norm):
            shapes[f"{module.module}.weight"] = (module.size,)
            continue
        if isinstance(module, Plain):
            shapes[module.name] = module.shape
            continue
        shapes[f"{module.module}.weight"] = (module.out_features, module.in_features)
        if module.has_bias:
            shapes[f"{module.module}.bias"] = (module.out_features,)
    return shapes


def layer_prefix(layer: int) -> str:
    """`model.layers.N.`, with which the names of everything in a layer begin."""
    return f"model.layers.{layer}."
