"""The scheduler assigns slots to sequences and plans the next step.

A step prefills as many prompt tokens as the budget allows and decodes one token of every running sequence. Waiting
sequences are admitted by priority, then in order of arrival. A request's other sequences are queued when the first has
computed their common prompt, and copy it from the first one's slot.
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
    """One step: first the `copies`, in order, then one token for each of `decode`, then the chunks of `prefill`.

    A sequence in `decode` may still await its last token, and may end with it.
    """

    admitted: tuple[Sequence, ...]
    copies: tuple[Copy, ...]
    prefill: tuple[PrefillChunk, ...]
    decode: tuple[Sequence, ...]

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


class Scheduler:
    """Assigns slots and plans steps; it uses neither the model nor a clock.

    Args:
        max_num_seqs: maximum number of running sequences.
        max_seq_len: positions of a slot. Steps also write to idle slots, at the last position, which is never reused.
        budget: limits the prompt tokens of a step.
        reuses_prompts, reuses_answers: whether later prompts may reuse a sequence's prompt and output.
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
        """Number of sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Number of sequences with a slot."""
        return len(self._running)

    @property
    def num_free_slots(self) -> int:
        """Number of free slots."""
        return self._slots.num_free

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence after the waiting ones of its priority."""
        heapq.heappush(self._waiting, (sequence.request.priority, next(self._order), sequence))

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence and free its slot."""
        if sequence.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
            heapq.heapify(self._waiting)
            return
        self._hold(sequence)
        del self._running[sequence.slot]
        self._slots.give_back(sequence.slot)
        sequence.slot = None

    def schedule(self) -> EngineStep:
        """Admit waiting sequences to free slots and plan the next step, which is empty if there is no work."""
        admitted: list[Sequence] = []
        copies: list[Copy] = []
        if self._slots.num_free and self._waiting:
            for running in self._running.values():
                self._hold(running)  # with the tokens computed so far
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
        """Handle failed copies of the step that admitted these sequences.

        The sequences compute their prompts in full, and the contents of free slots are no longer reused.
        """
        for sequence in admitted:
            if sequence.slot is not None:
                sequence.num_computed = 0
                self._slots.hold(sequence.slot, NO_IDS)
        self._slots.forget_free()

    def positions(self) -> dict[int, int]:
        """Return for each slot a position to which a decode step may write safely.

        A decode step writes to every slot up to the highest that it advances. In a running slot the position is that of
        its next token. In a free slot it is the last position, which is never reused. A step that is in flight when its
        sequence ends writes after the sequence's computed tokens, which isn't reused either.
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
        """Record which of the sequence's cached tokens other prompts may reuse."""
        assert sequence.slot is not None
        ids = sequence.request.prompt_ids
        if self._reuses_answers and sequence.is_prefilled:
            ids = np.concatenate([ids, np.array(sequence.output_ids, np.int64)])
        self._slots.hold(sequence.slot, ids[: min(sequence.num_computed, self._last_position)])
