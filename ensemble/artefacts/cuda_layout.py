"""How the `cuda` target lays out a decoder: what the builder writes and the runner reads.

Linear layers that read one input are one matrix, rows [out, in], as their part says: `qkv` (query heads, key heads,
value heads), `gate_up` (all of gate, then all of up). The experts' matrices are stacked, [num_experts, out, in]. Each
is E4M3 codes with a float32 scale for every row, or for every 128 columns of a row, or bfloat16. It knows no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry
from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.errors import SpecError
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.mla import LatentAttention
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.options import ExpertOptions, ExpertShare, LatentOptions
from deepseek_triton.ensemble.decoder.part import Norm, Part, Plain, fused_shape
from deepseek_triton.ensemble.protocol.settings import KvCache

WEIGHTS_FILE = "model.safetensors"
E4M3_MAX = 448.0
ONE_GPU = "the FP8 checkpoint's blocks are for one GPU; build the model again with this setting"
BLOCK_COLUMNS = 128  # of a row that have one scale, where a row has several
MIN_TOKEN_SCALE = 2.0**-14  # as in the graph: a token's activation scale is never smaller


class LayoutError(Exception):
    """The artefact's dimensions or tensors don't fit together; one line."""


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's dimensions in elements, `max_seq_len` in tokens.

    latent: its attention is latent attention. experts: its MLPs are experts but for the first layers'. expert_share:
    what a rank has of them; None: all.
    """

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
    latent: LatentOptions | None = None
    experts: ExpertOptions | None = None
    expert_share: ExpertShare | None = None

    def __post_init__(self) -> None:
        for field in fields(self)[:7]:
            if getattr(self, field.name) < 1:
                raise LayoutError(f"{field.name} is {getattr(self, field.name)}, must be at least 1")
        if self.max_seq_len < 2:
            raise LayoutError(f"max_seq_len is {self.max_seq_len}, must be at least 2")
        if self.num_heads % self.num_kv_heads:
            raise LayoutError(f"num_heads is {self.num_heads}, must be a multiple of num_kv_heads {self.num_kv_heads}")

    def parts(self, layer: int) -> tuple[Part, Part]:
        """A layer's attention and its MLP; biases are told by the stored tensors."""
        dense = self.experts is None or layer < self.experts.first_dense_layers
        return self._attention, self._dense_mlp if dense else self._experts

    @cached_property
    def kinds(self) -> tuple[Part, ...]:
        """The different parts of all layers."""
        return tuple(dict.fromkeys(part for layer in range(self.num_layers) for part in self.parts(layer)))

    @cached_property
    def _attention(self) -> Part:
        if self.latent is not None:
            return LatentAttention(self.hidden_size, self.num_heads, self.latent)
        return GroupedQueryAttention(
            self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, qk_norm=self.qk_norm
        )

    @cached_property
    def _dense_mlp(self) -> Part:
        return DenseMlp(self.hidden_size, self.intermediate_size)

    @cached_property
    def _experts(self) -> Part:
        assert self.experts is not None
        return MixtureOfExperts(self.hidden_size, self.experts, self.expert_share)

    @property
    def is_plain(self) -> bool:
        """Whether every layer is grouped-query attention and a dense MLP."""
        return all(isinstance(part, GroupedQueryAttention | DenseMlp) for part in self.kinds)

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that get a rotary embedding."""
        return self.head_dim if self.latent is None else self.latent.qk_rope_head_dim

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    def matrices(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The fused matrices of a layer, [out, in], and the stacks of its experts, [num_experts, out, in]."""
        return {name: fused_shape(part, name) for part in self.parts(layer) for name in (*part.fused, *part.stacked)}

    def token_elements(self) -> int:
        """Elements that a token has in the cache of one layer."""
        return sum(tensor.elements for tensor in self._attention.cache)

    def cache_bytes(self, num_sequences: int, itemsize: int = 2) -> int:
        """Bytes that `num_sequences` whole sequences have in the caches of all layers."""
        return self.num_layers * num_sequences * self.max_seq_len * self.token_elements() * itemsize

    def reason_against_cache(self, kv_cache: KvCache) -> str | None:
        """Why the caches can't have this form; None: they can."""
        if self.latent is not None and kv_cache == "pages-int8":
            return "kv_cache is pages-int8: latent attention has no INT8 cache; use pages"
        return None

    def linear_names(self) -> list[str]:
        """Every fused matrix and every stack, those of layer 0 first."""
        return [f"layers.{layer}.{group}" for layer in range(self.num_layers) for group in self.matrices(layer)]

    def entries(
        self, fp8: frozenset[str], biased: frozenset[str], *, has_blocks: bool = False
    ) -> dict[str, TensorEntry]:
        """The file's tensors in order.

        fp8, biased: the `linear_names` stored in FP8, and those that have a bias. has_blocks: a row of an FP8 matrix
        has a scale for every `BLOCK_COLUMNS` of its columns.
        """
        hidden, half = self.hidden_size, self.rotary_dim // 2
        entries = {"embedding": TensorEntry("BF16", (self.vocab_size, hidden))}
        for layer in range(self.num_layers):
            prefix = f"layers.{layer}."
            for norm in stored_norms(self.parts(layer)):
                entries[prefix + norm.stored] = TensorEntry("BF16", (norm.size,))
            for matrix, shape in self.matrices(layer).items():
                name = prefix + matrix
                entries[f"{name}.weight"] = TensorEntry("F8_E4M3" if name in fp8 else "BF16", shape)
                if name in fp8:
                    blocks = (-(-shape[-1] // BLOCK_COLUMNS),) if has_blocks else ()
                    entries[f"{name}.scale"] = TensorEntry("F32", (*shape[:-1], *blocks))
                if name in biased:
                    entries[f"{name}.bias"] = TensorEntry("F32", shape[:-1])
            for plain in stored_plains(self.parts(layer)):
                entries[prefix + plain.stored] = TensorEntry("F32", plain.shape)
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
        expected = self.entries(fp8, biased, has_blocks=has_block_scales(found))
        for name in sorted(set(expected) | set(found)):
            if expected.get(name) != found.get(name):
                raise LayoutError(
                    f"tensor {name} is {found.get(name, 'missing')}, needed: {expected.get(name, 'none')}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest; options that the decoder hasn't are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderShape:
        """Read `to_dict`'s values back.

        Raises:
            LayoutError: a field is missing, unknown or impossible.
        """
        needed = {field.name for field in fields(cls) if field.default is not None}
        odd = needed - set(values) | set(values) - {field.name for field in fields(cls)}
        if odd:
            raise LayoutError(
                f"the manifest's engine has missing or unknown fields {sorted(odd)}; build the model again"
            )
        try:
            read = {name: OPTIONS[name](**values[name]) for name in OPTIONS if name in values}
            return cls(**{**values, **read})
        except (TypeError, SpecError) as error:
            raise LayoutError(f"the manifest's engine: {error}; build the model again") from error


def has_block_scales(entries: Mapping[str, TensorEntry]) -> bool:
    """Whether the rows of the stored FP8 matrices have several scales each."""
    scales = (name for name in entries if name.endswith(".scale"))
    return any(
        len(entries[name].shape) == len(entries[f"{name.removesuffix('scale')}weight"].shape)
        for name in scales
        if f"{name.removesuffix('scale')}weight" in entries
    )


OPTIONS: dict[str, Any] = {"latent": LatentOptions, "experts": ExpertOptions}


def stored_norms(parts: Sequence[Part]) -> list[Norm]:
    """A layer's norms in the order in which they are stored: those before the parts, then those within them."""
    norms = [[module for module in part.modules if isinstance(module, Norm)] for part in parts]
    return [of_part[0] for of_part in norms] + [norm for of_part in norms for norm in of_part[1:]]


def stored_plains(parts: Sequence[Part]) -> list[Plain]:
    """A layer's other tensors in the order in which they are stored."""
    return [module for part in parts for module in part.modules if isinstance(module, Plain)]
