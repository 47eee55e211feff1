"""The scheduler: which sequence has which slot, and what the next step computes.

A step is at most one chunk of one prompt and one token for every running sequence, so a long prompt delays running
streams by one chunk at a time. Waiting sequences are served in order; a free slot is taken lowest first, which keeps
the decoded range `0 … highest active slot` short.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from ensemble.engine.sequence import Sequence


@dataclass(frozen=True)
class Step:
    """What to run now: a chunk of `prefill`'s prompt, if any, and one token for each of `decode`."""

    prefill: Sequence | None
    prefill_tokens: int
    decode: tuple[Sequence, ...]

    def __bool__(self) -> bool:
        return self.prefill is not None or bool(self.decode)


class Scheduler:
    """Assigns slots and plans steps; pure bookkeeping, no model and no clock."""

    def __init__(self, num_slots: int, prefill_chunk: int) -> None:
        self.prefill_chunk = prefill_chunk
        self._free = list(range(num_slots))  # a heap
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # slot → sequence, in order of admission

    @property
    def sequences(self) -> list[Sequence]:
        """Every unfinished sequence, running ones first."""
        return [*self._running.values(), *self._waiting]

    @property
    def num_free_slots(self) -> int:
        """Slots that hold no sequence."""
        return len(self._free)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those that wait already."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its slot is free at once."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        del self._running[sequence.slot]
        heapq.heappush(self._free, sequence.slot)
        sequence.slot = None

    def schedule(self) -> Step:
        """Admit what fits and plan the next step; an empty step means that there is nothing to do."""
        while self._free and self._waiting:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            self._running[sequence.slot] = sequence
        prefill = next((s for s in self._running.values() if not s.is_prefilled), None)
        tokens = 0 if prefill is None else min(self.prefill_chunk, len(prefill.prompt_ids) - prefill.num_computed)
        decode = tuple(s for s in self._running.values() if s.is_prefilled)
        return Step(prefill, tokens, decode)

    def positions(self) -> dict[int, int]:
        """For each running slot, the first position it doesn't use yet: where its next token goes.

        A decode step writes to every slot below the highest that it advances; here it does no harm.
        """
        return {slot: sequence.num_computed for slot, sequence in self._running.items()}
