"""The interface of a decoder layer's parts, and the small tables that a part is made of.

A decoder layer is a chain of parts, each with a norm before it and a residual connection around it: today attention,
then an MLP. A part declares its tensors, which of its linear layers read one input, and how it is sharded. It computes
nothing: the graph builder and the cuda runner have a forward pass of their own for each part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Norm:
    """An RMS norm's weight [size]; module, gguf, stored: its name in a checkpoint, in GGUF and in the cuda layout."""

    module: str
    gguf: str
    stored: str
    size: int


@dataclass(frozen=True)
class Linear:
    """A linear layer's weight [out_features, in_features], and its bias [out_features] where it has one.

    rotary_heads: heads in its output that get a rotary embedding; 0: none.
    """

    module: str
    gguf: str
    out_features: int
    in_features: int
    has_bias: bool = False
    rotary_heads: int = 0


@dataclass(frozen=True)
class Tap:
    """A value of the layer's graph that linear layers read: what calibration measures and smoothing scales.

    value: its name in the graph, without the layer's prefix. modules: the linear layers that read it. producer: the
    module whose output channels smoothing divides.
    """

    value: str
    modules: tuple[str, ...]
    producer: str


@dataclass(frozen=True)
class SharedChannels:
    """Input channels [num_groups, num_repeats, width] that copy their producer's channels [num_groups, width]."""

    num_groups: int
    num_repeats: int
    width: int


@dataclass(frozen=True)
class CacheTensor:
    """What a part keeps of each token: num_heads vectors of head_dim elements; `kind` is its name in the graph."""

    kind: str
    num_heads: int
    head_dim: int

    @property
    def elements(self) -> int:
        """Elements a token."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class Shard:
    """A rank's share of a stored tensor: `rows`, one after the other, None: all; of them `columns`, None: all."""

    rows: tuple[slice, ...] | None = None
    columns: slice | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The share's shape."""
        num_rows = whole[0] if self.rows is None else sum(rows.stop - rows.start for rows in self.rows)
        if self.columns is None:
            return (num_rows, *whole[1:])
        return num_rows, self.columns.stop - self.columns.start


WHOLE = Shard()


def part_of(start: int, rank: int, width: int) -> slice:
    """The rank's `width` rows or columns of a range that begins at `start`."""
    return slice(start + rank * width, start + (rank + 1) * width)


class Part(Protocol):
    """One part of a decoder layer.

    Modules are named as in Hugging Face's checkpoints, without the layer's prefix. LINEARS: patterns (`*` any
    characters) of the linear layers that may be FP8; a recipe matches names with them and has no model.
    """

    LINEARS: ClassVar[tuple[str, ...]]

    @property
    def modules(self) -> tuple[Norm | Linear, ...]:
        """Its modules in the order in which the graph reads them; the norm before it comes first."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The values that its linear layers read, in the order in which they are computed."""

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Stored matrix → the modules whose rows it holds, in order; they read one input."""

    @property
    def cache(self) -> tuple[CacheTensor, ...]:
        """What it keeps of each token; nothing for an MLP."""

    def shared_channels(self, tap: str) -> SharedChannels | None:
        """How the channels of `tap` repeat those of its producer; None: each is a channel of its own."""

    def reason_against(self, size: int) -> str | None:
        """Why it can't be sharded over `size` ranks; None: it can."""

    def sharded(self, size: int) -> Part:
        """What each of `size` ranks computes."""

    def shard(self, matrix: str, kind: str, rank: int, size: int) -> Shard:
        """A rank's share of one of its fused matrices; kind: "weight", "scale" or "bias"."""


def fused_shape(part: Part, matrix: str) -> tuple[int, int]:
    """[out_features, in_features] of one of a part's fused matrices."""
    linears = [module for module in part.modules if isinstance(module, Linear)]
    members = [linear for linear in linears if linear.module in part.fused[matrix]]
    return sum(linear.out_features for linear in members), members[0].in_features
