"""A pool of equal blocks with reference counts, in which full blocks are found by their tokens.

A full block's key is the block before it and its own tokens: a hash chain, whose keys are compared exactly. This module
knows neither sequences nor slots.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deepseek_triton.ensemble.engine.cache.manager import Ids

NOBODYS_BLOCK = 0  # tables begin with it; never allocated
Key = tuple[int, bytes]


@dataclass(frozen=True)
class Link:
    """A place in a chain of full blocks: a number that no other place ever has. START: before the first block."""

    number: int = 0


START = Link()


@dataclass(frozen=True)
class _Published:
    key: Key
    link: Link


class BlockPool:
    """Blocks 1 … num_blocks of `block_size` tokens each.

    A block without references is free. If it can be found, it keeps its contents until no other block is free; the
    least recently released is taken first. A sequence releases its last block first, so a chain is lost from its end.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._empty = list(range(num_blocks, NOBODYS_BLOCK, -1))  # a stack, the lowest on top
        self._num_references = [0] * (num_blocks + 1)
        self._published: dict[int, _Published] = {}
        self._by_key: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and without references, the oldest first
        self._numbers = itertools.count(START.number + 1)

    @property
    def num_free(self) -> int:
        """Number of blocks without references."""
        return len(self._empty) + len(self._idle)

    def is_free(self, block: int) -> bool:
        """Whether nobody refers to `block`."""
        return self._num_references[block] == 0

    def allocate(self) -> int:
        """Return a block with one reference; at least one must be free."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._unpublish(block)
        self._num_references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to `block`, which `find` returned."""
        self._num_references[block] += 1
        self._idle.pop(block, None)

    def release(self, blocks: Iterable[int]) -> None:
        """Take a reference from each of the blocks; those of one sequence come last block first."""
        for block in blocks:
            self._num_references[block] -= 1
            if self._num_references[block]:
                continue
            if block in self._published:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def find(self, ids: Ids) -> Iterator[tuple[int, Link]]:
        """Yield the blocks that hold the beginning of `ids` [n], with their places in the chain."""
        link = START
        for tokens in self._full(ids, 0):
            block = self._by_key.get((link.number, tokens))
            if block is None:
                return
            link = self._published[block].link
            yield block, link

    def publish(self, ids: Ids, blocks: list[int], first: int, link: Link) -> Link:
        """Make the full blocks of `ids` [n] findable, from the one with index `first` on, which follows `link`.

        A block whose tokens can be found already isn't published; the next one follows the block that is found.
        Returns the last block's place.
        """
        for index, tokens in enumerate(self._full(ids, first), first):
            key = link.number, tokens
            if key not in self._by_key:
                self._by_key[key] = blocks[index]
                self._published[blocks[index]] = _Published(key, Link(next(self._numbers)))
            link = self._published[self._by_key[key]].link
        return link

    def forget(self) -> None:
        """Make no block findable."""
        self._empty += self._idle
        self._idle.clear()
        self._published.clear()
        self._by_key.clear()

    def _full(self, ids: Ids, first: int) -> Iterator[bytes]:
        """The tokens of the full blocks of `ids`, from the block with index `first` on."""
        size = self.block_size
        return (ids[i * size : (i + 1) * size].tobytes() for i in range(first, len(ids) // size))

    def _unpublish(self, block: int) -> None:
        published = self._published.pop(block)
        del self._by_key[published.key]
