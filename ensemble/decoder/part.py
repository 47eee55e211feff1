"""The interface of a decoder layer's parts, and the small tables that a part is made of.

A decoder layer is a chain of parts, each with a norm before it and a residual connection around it: today attention,
then an MLP. A part declares its tensors, which of its linear layers read one input, and how it is sharded. It computes
nothing: the graph builder and the cuda runner have a forward pass of their own for each part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol


@dataclass(frozen=True)
class Norm:
    """An RMS norm's weight [size]; module, gguf, stored: its name in a checkpoint, in GGUF and in the cuda layout."""

    module: str
    gguf: str
    stored: str
    size: int


@dataclass(frozen=True)
class Rotary:
    """Channels [num_heads, head_dim] of which each head's `width`, from `start` on, get a rotary embedding."""

    num_heads: int
    head_dim: int
    start: int
    width: int


@dataclass(frozen=True)
class Linear:
    """A linear layer's weight [out_features, in_features], and its bias [out_features] where it has one.

    rotary: which channels of its output get a rotary embedding; None: none.
    """

    module: str
    gguf: str
    out_features: int
    in_features: int
    has_bias: bool = False
    rotary: Rotary | None = None


@dataclass(frozen=True)
class Plain:
    """A tensor that no engine quantises and that is no RMS norm's; float32 in the cuda layout.

    name, gguf, stored: its whole name in a checkpoint, in GGUF and in the cuda layout.
    """

    name: str
    gguf: str
    stored: str
    shape: tuple[int, ...]


Module = Norm | Linear | Plain


@dataclass(frozen=True)
class Tap:
    """A value of the layer's graph that linear layers read: what calibration measures and smoothing scales.

    value: its name in the graph, without the layer's prefix. modules: the linear layers that read it. producer: the
    module whose output channels smoothing divides; None: it can divide none.
    """

    value: str
    modules: tuple[str, ...]
    producer: str | None = None


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
class Split:
    """Over how many ranks a model is split.

    tensor_size: ranks that have a share of each attention and each MLP; 1: every rank has all of them. expert_size:
    groups of ranks that have whole experts of their own; 1: `tensor_size` splits experts as it does MLPs.
    """

    tensor_size: int = 1
    expert_size: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return max(self.tensor_size, self.expert_size)


@dataclass(frozen=True)
class Shard:
    """A rank's share of a stored tensor: `rows`, one after the other, None: all; of them `columns`, None: all.

    matrices: of a stack of matrices these, and of each the rows and columns; None: of a stack all of everything.
    """

    rows: tuple[slice, ...] | None = None
    columns: slice | None = None
    matrices: slice | None = None

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The share's shape."""
        if self.matrices is not None:
            return self.matrices.stop - self.matrices.start, *replace(self, matrices=None).shape(whole[1:])
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
    characters) of the linear layers that may be FP8; a recipe matches names with them and has no model. NOUN: what a
    user calls it.
    """

    NOUN: ClassVar[str]
    LINEARS: ClassVar[tuple[str, ...]]

    @property
    def modules(self) -> tuple[Module, ...]:
        """Its modules in the order in which the graph reads them; the norm before it comes first."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The values that its linear layers read, in the order in which they are computed."""

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Stored matrix → the modules whose rows it holds, in order; they read one input."""

    @property
    def stacked(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Stored stack of matrices → for each of them the modules whose rows it holds; nothing but for experts."""

    @property
    def cache(self) -> tuple[CacheTensor, ...]:
        """What it keeps of each token; nothing for an MLP."""

    def shared_channels(self, tap: str) -> SharedChannels | None:
        """How the channels of `tap` repeat those of its producer; None: each is a channel of its own."""

    def reason_against(self, split: Split) -> str | None:
        """Why it can't be split so; None: it can."""

    def sharded(self, split: Split, rank: int) -> Part:
        """What a rank computes."""

    def shard(self, matrix: str, kind: str, rank: int, split: Split) -> Shard:
        """A rank's share of one of its fused matrices or stacks; kind: "weight", "scale" or "bias"."""


def fused_shape(part: Part, matrix: str) -> tuple[int, ...]:
    """[out_features, in_features] of one of a part's fused matrices; of a stack [count, out_features, in_features]."""
    stack = part.stacked.get(matrix, ())
    members = stack[0] if stack else part.fused[matrix]
    linears = [module for module in part.modules if isinstance(module, Linear) and module.module in members]
    shape = sum(linear.out_features for linear in linears), linears[0].in_features
    return (len(stack), *shape) if stack else shape
