"""Slot allocation with prefix reuse.

A finished sequence's keys and values stay in its slot. A new prompt that begins with the same tokens reuses them, in
the same slot or by a copy. This module plans with token ids and slot numbers; it computes nothing.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import numpy as np

from deepseek_triton.ensemble.engine.cache.manager import Copy, Ids, Placement, TableChange

MIN_REUSED_TOKENS = 16  # a shorter prefix, such as the BOS that all prompts share, isn't worth a copy
NO_IDS = np.empty(0, np.int64)


@dataclass
class _Held:
    """The tokens in a slot's KV cache.

    ids: [n]. last_use: a counter, not a time. beginning: the first ids as bytes, for a quick comparison: comparing all
    ids of all slots with each new prompt would take longer than a step.
    """

    ids: Ids
    last_use: int
    beginning: bytes = b""


class Slots:
    """Allocates the lowest free slot, which keeps the decoded range `0 … highest active slot` short.

    The slot's old contents move to the least recently used free slot, so that later prompts can reuse them. `is_reused`
    false disables prefix reuse. Implements `CacheManager`; idle_position: the runner's last one, which isn't reused.
    """

    shares_begun = can_move = False
    num_blocks = num_free_blocks = 0

    def __init__(self, max_num_seqs: int, *, is_reused: bool = True, idle_position: int = 0) -> None:
        self.idle_position = idle_position
        self._free = list(range(max_num_seqs))  # a heap
        self._held = [_Held(NO_IDS, 0) for _ in range(max_num_seqs)]
        self._uses = itertools.count(1)
        self._is_reused = is_reused

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def take(self, ids: Ids) -> Placement:
        """See CacheManager: a free slot always has room."""
        slot = heapq.heappop(self._free)
        if not self._is_reused:
            return Placement(slot)
        source, num_reused = self._longest_match(ids, slot)
        copies = []
        kept = num_reused if source == slot else 0
        if len(self._held[slot].ids) - kept >= MIN_REUSED_TOKENS and (refuge := self._refuge(slot, source)) is not None:
            copies.append(Copy(slot, refuge, len(self._held[slot].ids)))
            self._held[refuge] = self._held[slot]
        if source != slot:
            copies.append(Copy(source, slot, num_reused))
        self.hold(slot, ids[:num_reused])
        return Placement(slot, num_reused, tuple(copies))

    def grow(self, slot: int, num_tokens: int) -> bool:
        """See CacheManager: always True."""
        return True

    def hold(self, slot: int, ids: Ids) -> None:
        """Record that the KV cache of `slot` holds `ids` [n], which later prompts may reuse."""
        self._held[slot] = _Held(ids, next(self._uses), _beginning(ids))

    def move(self, slot: int) -> int:
        """See CacheManager: there is no such way."""
        raise NotImplementedError("a slot's contents stay where they are")

    def give_back(self, slot: int) -> None:
        """Free `slot`; its contents can be reused until it is allocated again."""
        heapq.heappush(self._free, slot)

    def forget(self) -> None:
        """See CacheManager: the contents of the free slots."""
        for slot in self._free:
            self._held[slot] = _Held(NO_IDS, 0)

    def take_changes(self) -> tuple[TableChange, ...]:
        """See CacheManager: none."""
        return ()

    def _longest_match(self, prompt: Ids, preferred: int) -> tuple[int, int]:
        """Return the slot with the longest common prefix, `preferred` among equals, and the prefix's length.

        The prompt's last token is never reused, because its logits are needed.
        """
        best, most = preferred, 0
        reusable = prompt[:-1]
        if len(reusable) < MIN_REUSED_TOKENS:
            return best, most
        beginning = _beginning(reusable)
        alike = [slot for slot, held in enumerate(self._held) if held.beginning == beginning]
        for slot in sorted(alike, key=lambda slot: slot != preferred):
            if (length := _common_prefix(self._held[slot].ids, reusable)) > most:
                best, most = slot, length
        return best, most

    def _refuge(self, slot: int, source: int) -> int | None:
        """Return the least recently used free slot except `source`; None if it was used later than `slot`."""
        free = [other for other in self._free if other != source]
        oldest = min(free, key=lambda other: self._held[other].last_use, default=None)
        if oldest is None or self._held[oldest].last_use > self._held[slot].last_use:
            return None
        return oldest


def _beginning(ids: Ids) -> bytes:
    return ids[:MIN_REUSED_TOKENS].tobytes()


def _common_prefix(a: Ids, b: Ids) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length
