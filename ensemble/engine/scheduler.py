"""The scheduler: which sequence has which slot, and what the next step computes.

A step is a budget's worth of prompts and one token for every running sequence. The waiting are served by priority and
then in order; further sequences of one request wait until the first has computed their common prompt, which they then
find in its slot.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from deepseek_triton.ensemble.engine.budget import PrefillBudget
from deepseek_triton.ensemble.engine.sequence import Sequence
from deepseek_triton.ensemble.engine.slots import NO_IDS, Copy, Slots


@dataclass(frozen=True)
class PrefillChunk:
    """The next `num_tokens` of a sequence's prompt."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True)
class EngineStep:
    """What to begin now: `copies` first and in order, then one token for each of `decode`, then chunks of prompts.

    A sequence of `decode` may still await its last token, and perhaps ends with it.
    """

    admitted: tuple[Sequence, ...]
    copies: tuple[Copy, ...]
    prefill: tuple[PrefillChunk, ...]
    decode: tuple[Sequence, ...]

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


class Scheduler:
    """Assigns slots and plans steps; pure bookkeeping, no model and no clock.

    Args:
        max_num_seqs: how many sequences run at once.
        max_seq_len: positions of a slot. A step writes to idle slots too: there, the last position takes the harm.
        budget: how much of the prompts a step computes.
        reuses_prompts, reuses_answers: what a finished sequence leaves for later prompts.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_seq_len: int,
        budget: PrefillBudget,
        *,
        reuses_prompts: bool = True,
        reuses_answers: bool = False,
    ) -> None:
        self._max_num_seqs = max_num_seqs
        self._last_position = max_seq_len - 1
        self._budget = budget
        self._slots = Slots(max_num_seqs, is_reused=reuses_prompts)
        self._reuses_answers = reuses_answers
        self._waiting: list[tuple[int, int, Sequence]] = []  # a heap by priority, then order of arrival
        self._order = itertools.count()
        self._running: dict[int, Sequence] = {}  # slot → sequence, in order of admission

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Slots that a sequence has."""
        return len(self._running)

    @property
    def num_free_slots(self) -> int:
        """Slots that no sequence has."""
        return self._slots.num_free

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its priority that wait already."""
        heapq.heappush(self._waiting, (sequence.request.priority, next(self._order), sequence))

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its slot is free at once."""
        if sequence.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
            heapq.heapify(self._waiting)
            return
        self._hold(sequence)
        del self._running[sequence.slot]
        self._slots.give_back(sequence.slot)
        sequence.slot = None

    def schedule(self) -> EngineStep:
        """Admit what fits and plan the next step; an empty step means that there is nothing to do."""
        admitted: list[Sequence] = []
        copies: list[Copy] = []
        if self._slots.num_free and self._waiting:
            for running in self._running.values():
                self._hold(running)  # as far as it is now
        while self._slots.num_free and self._waiting:
            sequence = heapq.heappop(self._waiting)[2]
            placement = self._slots.take(sequence.request.prompt_ids)
            sequence.slot, sequence.num_computed = placement.slot, placement.num_reused
            self._running[placement.slot] = sequence
            admitted.append(sequence)
            copies += placement.copies
        decode = tuple(s for s in self._running.values() if s.num_begun >= len(s.request.prompt_ids))
        return EngineStep(tuple(admitted), tuple(copies), self._chunks(bool(decode)), decode)

    def forget_copies(self, admitted: Iterable[Sequence]) -> None:
        """The copies of the step that admitted these have failed: they begin at the beginning, and nothing that a free
        slot holds is certain."""
        for sequence in admitted:
            if sequence.slot is not None:
                sequence.num_computed = 0
                self._slots.hold(sequence.slot, NO_IDS)
        self._slots.forget_free()

    def positions(self) -> dict[int, int]:
        """For each slot, a position that a decode step may write to without harm.

        A decode step writes to every slot below the highest that it advances: a running one's next token goes there
        anyway, behind those that are being computed; a free one's cache is never used up to its last position. A step
        that is in flight when its sequence ends writes behind what the sequence computed, which nobody finds.
        """
        free = dict.fromkeys(range(self._max_num_seqs), self._last_position)
        return free | {slot: sequence.num_begun for slot, sequence in self._running.items()}

    def _chunks(self, is_decoding: bool) -> tuple[PrefillChunk, ...]:
        chunks, left = [], self._budget.tokens(is_decoding=is_decoding)
        for sequence in self._running.values():
            num_tokens = min(left, len(sequence.request.prompt_ids) - sequence.num_begun)
            if num_tokens > 0:
                chunks.append(PrefillChunk(sequence, num_tokens))
                left -= num_tokens
        return tuple(chunks)

    def _hold(self, sequence: Sequence) -> None:
        """Note how much of the sequence's cache may be found by others."""
        assert sequence.slot is not None
        ids = sequence.request.prompt_ids
        if self._reuses_answers and sequence.is_prefilled:
            ids = np.concatenate([ids, np.array(sequence.output_ids, np.int64)])
        self._slots.hold(sequence.slot, ids[: min(sequence.num_computed, self._last_position)])
