"""Allocation by blocks: a sequence has those that its tokens fill, and shares full ones with those that begin alike.

Nobody writes to a shared block, because only full blocks are shared, and never a prompt's last token.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from deepseek_triton.ensemble.engine.cache.blocks import START, BlockPool, Link
from deepseek_triton.ensemble.engine.cache.manager import Ids, Placement, TableChange


@dataclass
class _Table:
    """A running sequence's blocks.

    num_published: how many of them, from the first on, are shared or offered to others. link: the last one's place.
    """

    blocks: list[int] = field(default_factory=list)
    num_published: int = 0
    link: Link = START


class Pages:
    """Allocates the lowest free slot and blocks for it. Implements `CacheManager`; an idle slot writes nothing.

    Args:
        num_blocks: blocks that sequences can have; they must hold one sequence of `max_seq_len`.
        is_reused: false: sequences share nothing.
    """

    shares_begun = True
    idle_position = -1
    can_move = True

    def __init__(
        self, max_num_seqs: int, max_seq_len: int, *, num_blocks: int, block_size: int, is_reused: bool = True
    ) -> None:
        assert num_blocks * block_size >= max_seq_len
        self._pool = BlockPool(num_blocks, block_size)
        self._max_seq_len, self._is_reused = max_seq_len, is_reused
        self._free = list(range(max_num_seqs))  # a heap
        self._tables: dict[int, _Table] = {}
        self._changes: list[TableChange] = []

    @property
    def num_free(self) -> int:
        """See CacheManager."""
        return len(self._free)

    @property
    def num_blocks(self) -> int:
        """See CacheManager."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """See CacheManager."""
        return self._pool.num_free

    def take(self, ids: Ids) -> Placement | None:
        """See CacheManager; one free block is left for each running sequence to grow."""
        pool = self._pool
        found = list(pool.find(ids[:-1])) if self._is_reused else []
        num_new = self._num_blocks_of(len(ids) + 1) - len(found)
        num_idle = sum(pool.is_free(block) for block, _ in found)
        if pool.num_free - num_idle - num_new < len(self._tables):
            return None
        for block, _ in found:
            pool.share(block)
        slot = heapq.heappop(self._free)
        shared = [block for block, _ in found]
        link = found[-1][1] if found else START
        self._tables[slot] = _Table(shared, len(found), link)
        if shared:
            self._changes.append(TableChange(slot, 0, tuple(shared)))
        self._add_blocks(slot, num_new)
        return Placement(slot, len(found) * pool.block_size)

    def grow(self, slot: int, num_tokens: int) -> bool:
        """See CacheManager."""
        missing = self._num_blocks_of(num_tokens) - len(self._tables[slot].blocks)
        if missing > self._pool.num_free:
            return False
        self._add_blocks(slot, missing)
        return True

    def move(self, slot: int) -> int:
        """See CacheManager: the other slot's table gets the blocks."""
        target = heapq.heappushpop(self._free, slot)
        table = self._tables[target] = self._tables.pop(slot)
        self._changes.append(TableChange(target, 0, tuple(table.blocks)))
        return target

    def hold(self, slot: int, ids: Ids) -> None:
        """See CacheManager; `ids` begin with those that `slot` held before."""
        table = self._tables[slot]
        num_full = len(ids) // self._pool.block_size
        if not self._is_reused or num_full <= table.num_published:
            return
        table.link = self._pool.publish(ids, table.blocks, table.num_published, table.link)
        table.num_published = num_full

    def give_back(self, slot: int) -> None:
        """See CacheManager."""
        self._pool.release(reversed(self._tables.pop(slot).blocks))
        heapq.heappush(self._free, slot)

    def forget(self) -> None:
        """See CacheManager: running sequences keep their blocks, and nothing can be found."""
        self._pool.forget()
        for table in self._tables.values():
            table.num_published, table.link = 0, START

    def take_changes(self) -> tuple[TableChange, ...]:
        """See CacheManager."""
        changes, self._changes = tuple(self._changes), []
        return changes

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-min(num_tokens, self._max_seq_len) // self._pool.block_size)

    def _add_blocks(self, slot: int, count: int) -> None:
        if count <= 0:
            return
        table = self._tables[slot]
        blocks = tuple(self._pool.allocate() for _ in range(count))
        self._changes.append(TableChange(slot, len(table.blocks), blocks))
        table.blocks += blocks
