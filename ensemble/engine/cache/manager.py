"""The interface of a cache manager, which is all that the scheduler knows about a runner's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Copy:
    """A copy of the first `num_tokens` positions of slot `source` to slot `target`."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True)
class TableChange:
    """Entries `first`, `first` + 1, … of the table of `slot` become `blocks`."""

    slot: int
    first: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """The slot of a prompt. After the `copies`, done in order, `slot` holds the prompt's first `num_reused` tokens."""

    slot: int
    num_reused: int = 0
    copies: tuple[Copy, ...] = ()


class CacheManager(Protocol):
    """Allocates the memory of sequences. A running sequence has a slot, which is its row in a decode step.

    shares_begun: whether `hold` may name tokens that a planned step computes. Such a manager has no copies, and after
    a failed step everything that it holds must be forgotten.
    idle_position: the position that a decode step gets for a slot without a sequence.
    can_move: whether there is `move`.
    """

    shares_begun: bool
    idle_position: int
    can_move: bool

    @property
    def num_free(self) -> int:
        """Number of free slots."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks that sequences can have; 0 where slots are whole."""

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that no sequence has, those among them that can still be found."""

    def take(self, ids: Ids) -> Placement | None:
        """Allocate a slot, at least one must be free, for `ids` [n] and a next token; None: no room for them now."""

    def grow(self, slot: int, num_tokens: int) -> bool:
        """Make room for the first `num_tokens` positions of `slot`; False: no block is free."""

    def move(self, slot: int) -> int:
        """Give the sequence in `slot`, of which no call is in flight, the lowest free slot, and return that."""

    def hold(self, slot: int, ids: Ids) -> None:
        """Record that the cache of `slot` holds `ids` [n], which later prompts may reuse."""

    def give_back(self, slot: int) -> None:
        """Free `slot` and its memory; its contents can be reused until they are overwritten."""

    def forget(self) -> None:
        """Forget what can be reused and doesn't belong to a running sequence alone."""

    def take_changes(self) -> tuple[TableChange, ...]:
        """Return the changes of the tables since the last call, in order."""
