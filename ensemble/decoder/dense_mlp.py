"""The gated MLP (SwiGLU): down(silu(gate(x)) * up(x)).

Source: Shazeer, arXiv 2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from deepseek_triton.ensemble.decoder.part import (
    WHOLE,
    CacheTensor,
    Linear,
    Norm,
    Shard,
    SharedChannels,
    Split,
    Tap,
    part_of,
)

NORM = "post_attention_layernorm"
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
PRODUCT = "mlp.product"  # silu(gate(x)) * up(x)
ALIGNMENT = 16  # elements of a matrix's inner dimension that FP8 matrix products read together


@dataclass(frozen=True)
class DenseMlp:
    """Dimensions in elements."""

    hidden_size: int
    intermediate_size: int
    has_bias: bool = False

    NOUN: ClassVar[str] = "dense MLP"
    LINEARS: ClassVar[tuple[str, ...]] = (GATE, UP, DOWN)

    @property
    def modules(self) -> tuple[Norm | Linear, ...]:
        """See `Part`."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return (
            Norm(NORM, "ffn_norm", "mlp_norm", hidden),
            Linear(GATE, "ffn_gate", inner, hidden, self.has_bias),
            Linear(UP, "ffn_up", inner, hidden, self.has_bias),
            Linear(DOWN, "ffn_down", hidden, inner, self.has_bias),
        )

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `Part`."""
        return Tap(NORM, (GATE, UP), producer=NORM), Tap(PRODUCT, (DOWN,), producer=UP)

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """All of gate, then all of up; and down."""
        return {"gate_up": (GATE, UP), "down": (DOWN,)}

    @property
    def stacked(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Nothing."""
        return {}

    @property
    def cache(self) -> tuple[CacheTensor, ...]:
        """Nothing."""
        return ()

    def shared_channels(self, tap: str) -> SharedChannels | None:
        """None: every channel is its own."""
        return None

    def reason_against(self, split: Split) -> str | None:
        """See `Part`."""
        size = split.tensor_size
        if self.intermediate_size % size:
            return f"intermediate_size {self.intermediate_size} can't be shared out evenly"
        if size > 1 and (width := self.intermediate_size // size) % ALIGNMENT:
            return f"each rank's part of intermediate_size is {width}, must be a multiple of {ALIGNMENT}"
        return None

    def sharded(self, split: Split, rank: int) -> DenseMlp:
        """Columns of the intermediate state."""
        return replace(self, intermediate_size=self.intermediate_size // split.tensor_size)

    def shard(self, matrix: str, kind: str, rank: int, split: Split) -> Shard:
        """Rows of gate and of up; columns of down, so that each rank has a part of every sum."""
        return mlp_shard(matrix, kind, self.intermediate_size, rank % split.tensor_size, split.tensor_size)


def mlp_shard(matrix: str, kind: str, inner: int, rank: int, size: int) -> Shard:
    """A rank's share of `gate_up` or `down` of a gated MLP that is `inner` wide, one of `size` equal shares."""
    width = inner // size
    if matrix.endswith("gate_up"):
        return Shard(tuple(part_of(start, rank, width) for start in (0, inner)))
    return Shard(columns=part_of(0, rank, width)) if kind == "weight" else WHOLE
