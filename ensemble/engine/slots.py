"""Slots: which is free, and what each one's cache still holds for a prompt that begins the same way.

A finished sequence leaves its tokens' keys and values behind. A new prompt that begins with them continues from there,
in the same slot or by a copy. It plans in token ids and slot numbers; it computes nothing and knows no requests.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
MIN_REUSED_TOKENS = 16  # fewer, such as a BOS that every prompt has, aren't worth a copy
NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Copy:
    """The first `num_tokens` positions of slot `source` go to slot `target`."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True)
class Placement:
    """Where a prompt goes: do the `copies` in order, then `slot` holds its first `num_reused` tokens."""

    slot: int
    num_reused: int = 0
    copies: tuple[Copy, ...] = ()


@dataclass
class _Held:
    """What a slot's cache holds; `last_use` is a count, not a time."""

    ids: Ids
    last_use: int
    beginning: bytes = b""  # of the ids: comparing all of them with each new prompt would take longer than a step


class Slots:
    """The lowest free slot is taken first, which keeps the decoded range `0 … highest active slot` short.

    What that slot held moves to the free slot that was used longest ago, so that it can still be found. With
    `is_reused` false nothing is ever found.
    """

    def __init__(self, max_num_seqs: int, *, is_reused: bool = True) -> None:
        self._free = list(range(max_num_seqs))  # a heap
        self._held = [_Held(NO_IDS, 0) for _ in range(max_num_seqs)]
        self._uses = itertools.count(1)
        self._is_reused = is_reused

    @property
    def num_free(self) -> int:
        """Slots that no sequence has."""
        return len(self._free)

    def take(self, prompt: Ids) -> Placement:
        """Take a free slot for `prompt` [n]; there must be one."""
        slot = heapq.heappop(self._free)
        if not self._is_reused:
            return Placement(slot)
        source, num_reused = self._longest_match(prompt, slot)
        copies = []
        kept = num_reused if source == slot else 0
        if len(self._held[slot].ids) - kept >= MIN_REUSED_TOKENS and (refuge := self._refuge(slot, source)) is not None:
            copies.append(Copy(slot, refuge, len(self._held[slot].ids)))
            self._held[refuge] = self._held[slot]
        if source != slot:
            copies.append(Copy(source, slot, num_reused))
        self.hold(slot, prompt[:num_reused])
        return Placement(slot, num_reused, tuple(copies))

    def hold(self, slot: int, ids: Ids) -> None:
        """Note that the cache of `slot` holds `ids`, and may be copied from."""
        self._held[slot] = _Held(ids, next(self._uses), _beginning(ids))

    def give_back(self, slot: int) -> None:
        """Free `slot`; what it holds can be found until it is taken again."""
        heapq.heappush(self._free, slot)

    def forget_free(self) -> None:
        """Find nothing more of what the free slots hold."""
        for slot in self._free:
            self._held[slot] = _Held(NO_IDS, 0)

    def _longest_match(self, prompt: Ids, preferred: int) -> tuple[int, int]:
        """The slot that holds most of the prompt's beginning, and how many tokens; the last token is never reused,
        for its logits are wanted."""
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
        """The free slot, other than `source`, that was used longest ago, and before `slot` was."""
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
