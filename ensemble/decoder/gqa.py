"""Grouped-query attention with rotary embedding; multi-head attention is the case of one query head a key head.

Source: Ainslie et al., arXiv 2305.13245.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from deepseek_triton.ensemble.decoder.part import (
    WHOLE,
    CacheTensor,
    Linear,
    Norm,
    Rotary,
    Shard,
    SharedChannels,
    Split,
    Tap,
    part_of,
)

NORM = "input_layernorm"
Q, K, V, OUT = (f"self_attn.{name}_proj" for name in "qkvo")
ATTENDED = "self_attn.attention_flat"  # what attention gives, heads side by side


@dataclass(frozen=True)
class GroupedQueryAttention:
    """Dimensions in elements; query heads of a group read the same key and value head."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False

    NOUN: ClassVar[str] = "grouped-query attention"
    LINEARS: ClassVar[tuple[str, ...]] = (Q, K, V, OUT)

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def modules(self) -> tuple[Norm | Linear, ...]:
        """See `Part`."""
        hidden = self.hidden_size

        def head_norm(name: str) -> tuple[Norm, ...]:
            norm = Norm(f"self_attn.{name}_norm", f"attn_{name}_norm", f"{name}_norm", self.head_dim)
            return (norm,) if self.qk_norm else ()

        def rotary(num_heads: int) -> Rotary:
            return Rotary(num_heads, self.head_dim, 0, self.head_dim)

        return (
            Norm(NORM, "attn_norm", "attention_norm", hidden),
            Linear(Q, "attn_q", self.q_size, hidden, self.qkv_bias, rotary(self.num_heads)),
            *head_norm("q"),
            Linear(K, "attn_k", self.kv_size, hidden, self.qkv_bias, rotary(self.num_kv_heads)),
            *head_norm("k"),
            Linear(V, "attn_v", self.kv_size, hidden, self.qkv_bias),
            Linear(OUT, "attn_output", hidden, self.q_size, self.o_bias),
        )

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `Part`."""
        return Tap(NORM, (Q, K, V), producer=NORM), Tap(ATTENDED, (OUT,), producer=V)

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Query heads, key heads, then value heads; and o."""
        return {"qkv": (Q, K, V), "o": (OUT,)}

    @property
    def stacked(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Nothing."""
        return {}

    @property
    def cache(self) -> tuple[CacheTensor, ...]:
        """Keys and values."""
        return tuple(CacheTensor(kind, self.num_kv_heads, self.head_dim) for kind in ("key", "value"))

    def shared_channels(self, tap: str) -> SharedChannels | None:
        """Attention's output has each value head once for each of its query heads."""
        if tap != ATTENDED:
            return None
        return SharedChannels(self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim)

    def reason_against(self, split: Split) -> str | None:
        """See `Part`."""
        size = split.tensor_size
        if self.num_heads % size:
            return f"{self.num_heads} query heads can't be shared out evenly"
        if self.num_kv_heads % size and size % self.num_kv_heads:
            return f"{self.num_kv_heads} key heads can't be shared out evenly"
        return None

    def sharded(self, split: Split, rank: int) -> GroupedQueryAttention:
        """Whole heads; with fewer key heads than ranks, several ranks have the same one."""
        size = split.tensor_size
        return replace(self, num_heads=self.num_heads // size, num_kv_heads=max(1, self.num_kv_heads // size))

    def shard(self, matrix: str, kind: str, rank: int, split: Split) -> Shard:
        """Rows of q, k and v; columns of o, so that each rank has a part of every sum."""
        own, size = self.sharded(split, rank), split.tensor_size
        rank %= size
        if matrix == "qkv":
            first = rank * self.num_kv_heads // size * self.head_dim  # of the key heads; some ranks share one
            keys = slice(self.q_size + first, self.q_size + first + own.kv_size)
            values = slice(keys.start + self.kv_size, keys.stop + self.kv_size)
            return Shard((part_of(0, rank, own.q_size), keys, values))
        return Shard(columns=part_of(0, rank, own.q_size)) if kind == "weight" else WHOLE
