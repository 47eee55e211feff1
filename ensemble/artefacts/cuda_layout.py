"""How the `cuda` target lays out a decoder: what the builder writes and the runner reads.

Linear layers that read one input are one matrix, rows [out, in]: `qkv` (query heads, key heads, value heads) and
`gate_up` (all of gate, then all of up). Each is E4M3 codes with a float32 scale for every row, or bfloat16. It knows
no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry
from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.part import Norm, Part, fused_shape

WEIGHTS_FILE = "model.safetensors"
E4M3_MAX = 448.0
MIN_TOKEN_SCALE = 2.0**-14  # as in the graph: a token's activation scale is never smaller


class LayoutError(Exception):
    """The artefact's dimensions or tensors don't fit together; one line."""


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's dimensions in elements, `max_seq_len` in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_seq_len: int
    tie_word_embeddings: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for field in fields(self)[:7]:
            if getattr(self, field.name) < 1:
                raise LayoutError(f"{field.name} is {getattr(self, field.name)}, must be at least 1")
        if self.max_seq_len < 2:
            raise LayoutError(f"max_seq_len is {self.max_seq_len}, must be at least 2")
        if self.num_heads % self.num_kv_heads:
            raise LayoutError(f"num_heads is {self.num_heads}, must be a multiple of num_kv_heads {self.num_kv_heads}")

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts of a layer; biases are told by the stored tensors."""
        return (
            GroupedQueryAttention(
                self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, qk_norm=self.qk_norm
            ),
            DenseMlp(self.hidden_size, self.intermediate_size),
        )

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The fused matrices of a layer, [out, in], in the order in which they are used."""
        return {name: fused_shape(part, name) for part in self.parts for name in part.fused}

    def cache_bytes(self, num_sequences: int, itemsize: int = 2) -> int:
        """Bytes that `num_sequences` whole sequences have in the caches of all layers."""
        elements = sum(tensor.elements for part in self.parts for tensor in part.cache)
        return self.num_layers * num_sequences * self.max_seq_len * elements * itemsize

    def linear_names(self) -> list[str]:
        """Every fused matrix, `layers.0.qkv` first."""
        return [f"layers.{layer}.{group}" for layer in range(self.num_layers) for group in self.matrices]

    def entries(self, fp8: frozenset[str], biased: frozenset[str]) -> dict[str, TensorEntry]:
        """The file's tensors in order. fp8, biased: the `linear_names` stored in FP8, and those that have a bias."""
        hidden, half = self.hidden_size, self.head_dim // 2
        entries = {"embedding": TensorEntry("BF16", (self.vocab_size, hidden))}
        for layer in range(self.num_layers):
            prefix = f"layers.{layer}."
            for norm in stored_norms(self.parts):
                entries[prefix + norm.stored] = TensorEntry("BF16", (norm.size,))
            for matrix, shape in self.matrices.items():
                name = prefix + matrix
                entries[f"{name}.weight"] = TensorEntry("F8_E4M3" if name in fp8 else "BF16", shape)
                if name in fp8:
                    entries[f"{name}.scale"] = TensorEntry("F32", shape[:1])
                if name in biased:
                    entries[f"{name}.bias"] = TensorEntry("F32", shape[:1])
        entries["norm"] = TensorEntry("BF16", (hidden,))
        if not self.tie_word_embeddings:
            entries["head"] = TensorEntry("BF16", (self.vocab_size, hidden))
        entries |= {f"rope.{name}": TensorEntry("F32", (self.max_seq_len, half)) for name in ("cos", "sin")}
        return entries

    def check(self, found: Mapping[str, TensorEntry]) -> None:
        """Is every tensor here, of a dtype and shape that this decoder can have, and no other?

        Raises:
            LayoutError: names the first that is not.
        """
        names = self.linear_names()
        fp8 = frozenset(name for name in names if f"{name}.scale" in found)
        biased = frozenset(name for name in names if f"{name}.bias" in found)
        expected = self.entries(fp8, biased)
        for name in sorted(set(expected) | set(found)):
            if expected.get(name) != found.get(name):
                raise LayoutError(
                    f"tensor {name} is {found.get(name, 'missing')}, needed: {expected.get(name, 'none')}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderShape:
        """Read `to_dict`'s values back.

        Raises:
            LayoutError: a field is missing or unknown.
        """
        if odd := sorted({field.name for field in fields(cls)} ^ set(values)):
            raise LayoutError(f"the manifest's engine has missing or unknown fields {odd}; build the model again")
        return cls(**values)


def stored_norms(parts: Sequence[Part]) -> list[Norm]:
    """A layer's norms in the order in which they are stored: those before the parts, then those within them."""
    norms = [[module for module in part.modules if isinstance(module, Norm)] for part in parts]
    return [of_part[0] for of_part in norms] + [norm for of_part in norms for norm in of_part[1:]]
