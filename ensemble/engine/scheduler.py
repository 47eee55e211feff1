"""The scheduler gives sequences slots and memory, and plans the next step.

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
from deepseek_triton.ensemble.engine.cache.manager import CacheManager, Copy, TableChange
from deepseek_triton.ensemble.engine.cache.slots import NO_IDS
from deepseek_triton.ensemble.engine.sequence import Sequence


@dataclass(frozen=True)
class PrefillChunk:
    """The next `num_tokens` of a sequence's prompt, and of its output if it was preempted."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True)
class EngineStep:
    """One step: the `copies` and `tables` in order, then one token for each of `decode`, then the chunks of `prefill`.

    tables: changes of the slots' tables of blocks.

    A sequence in `decode` may still await its last token, and may end with it.
    """

    admitted: tuple[Sequence, ...]
    copies: tuple[Copy, ...]
    tables: tuple[TableChange, ...]
    prefill: tuple[PrefillChunk, ...]
    decode: tuple[Sequence, ...]

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


# Sequences wait for their token to move down when a step has this many times as many rows as there are sequences.
MOVING_FROM = 1.5


class Scheduler:
    """Assigns slots and plans steps; it uses neither the model nor a clock.

    A step computes every row up to the highest slot in use, so sequences move to free lower slots where the cache can.

    If a running sequence's next token finds no room, the newest sequence of the lowest priority gives up its memory and
    waits; its prompt and its output so far are computed again later.

    Args:
        max_num_seqs: maximum number of running sequences.
        max_seq_len: maximum number of tokens of a sequence. The last position's cache is never reused.
        budget: limits the prompt tokens of a step.
        cache: who has which part of the runner's cache.
        reuses_answers: whether later prompts may reuse a sequence's output.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_seq_len: int,
        budget: PrefillBudget,
        cache: CacheManager,
        *,
        reuses_answers: bool = False,
    ) -> None:
        self.num_preempted = 0  # so far
        self.cache = cache
        self._max_num_seqs = max_num_seqs
        self._max_seq_len = max_seq_len
        self._budget = budget
        self._reuses_answers = reuses_answers
        self._waiting: list[tuple[int, int, Sequence]] = []  # a heap by priority, then order of arrival
        self._order = itertools.count()
        self._running: dict[int, Sequence] = {}  # slot → sequence, in order of admission
        self._preempted: list[Sequence] = []  # with calls in flight, after which they wait again

    @property
    def num_waiting(self) -> int:
        """Number of sequences without a slot."""
        return len(self._waiting) + len(self._preempted)

    def num_waiting_before(self, priority: int) -> int:
        """Number of waiting sequences that are at least as urgent. For any thread."""
        preempted = sum(sequence.request.priority <= priority for sequence in list(self._preempted))
        return preempted + sum(entry[0] <= priority for entry in list(self._waiting))

    @property
    def num_running(self) -> int:
        """Number of sequences with a slot."""
        return len(self._running)

    @property
    def num_free_slots(self) -> int:
        """Number of free slots."""
        return self.cache.num_free

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence after the waiting ones of its priority."""
        sequence.order, sequence.is_added = next(self._order), True
        self._queue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence and free its slot."""
        if sequence.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
            heapq.heapify(self._waiting)
            self._preempted = [other for other in self._preempted if other is not sequence]
            return
        self._free(sequence)

    def schedule(self) -> EngineStep:
        """Admit waiting sequences to free slots and plan the next step, which is empty if there is no work."""
        self._queue_preempted()
        left_out = self._move_down() if self.cache.can_move else set()
        decode = self._with_room(
            tuple(s for s in self._running.values() if s.num_begun >= s.num_context and s not in left_out)
        )
        left = self._budget.tokens(is_decoding=bool(decode or left_out))
        chunks: list[PrefillChunk] = []
        for sequence in self._running.values():
            left = self._add_chunk(chunks, sequence, left)
        admitted: list[Sequence] = []
        copies: list[Copy] = []
        if self.cache.num_free and self._waiting:
            for running in self._running.values():
                self._hold(running)  # with the tokens computed so far
        # What a step computes can be shared by whom the step admits, so they come when their turn to compute has come.
        # Nobody overtakes a preempted sequence that waits for its calls in flight.
        may_begin = not self._preempted
        while may_begin and self.cache.num_free and self._waiting and (left > 0 or not self.cache.shares_begun):
            sequence = self._waiting[0][2]
            placement = self.cache.take(sequence.context())
            if placement is None:  # nobody overtakes the first
                break
            heapq.heappop(self._waiting)
            sequence.slot, sequence.num_computed = placement.slot, placement.num_reused
            self._running[placement.slot] = sequence
            admitted.append(sequence)
            copies += placement.copies
            left = self._add_chunk(chunks, sequence, left)
        return EngineStep(tuple(admitted), tuple(copies), self.cache.take_changes(), tuple(chunks), decode)

    def forget_copies(self, admitted: Iterable[Sequence]) -> None:
        """Handle failed copies of the step that admitted these sequences.

        The sequences compute their prompts in full, and the contents of free slots are no longer reused.
        """
        for sequence in admitted:
            if sequence.slot is not None:
                sequence.num_computed = 0
                self.cache.hold(sequence.slot, NO_IDS)
        self.cache.forget()

    def recover(self) -> None:
        """Handle a failed step: what it should have computed must not be reused.

        If running sequences may share that, they compute everything again.
        """
        if not self.cache.shares_begun:
            return
        for sequence in list(self._running.values()):
            self._preempt(sequence)
        self.cache.forget()

    def positions(self) -> dict[int, int]:
        """Return for each slot a position to which a decode step may write safely.

        A decode step writes to every slot up to the highest that it advances. In a running slot the position is that of
        its next token. In a free slot it is one that is never reused, or none. A step that is in flight when its
        sequence ends writes after the sequence's computed tokens, which isn't reused either.
        """
        free = dict.fromkeys(range(self._max_num_seqs), self.cache.idle_position)
        return free | {slot: sequence.num_begun for slot, sequence in self._running.items()}

    def _queue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.request.priority, sequence.order, sequence))

    def _queue_preempted(self) -> None:
        """Queue the preempted sequences whose calls in flight have ended, each in its old place."""
        landed = [sequence for sequence in self._preempted if not sequence.is_awaited]
        self._preempted = [sequence for sequence in self._preempted if sequence.is_awaited]
        for sequence in landed:
            sequence.num_computed = 0
            self._queue(sequence)

    def _move_down(self) -> set[Sequence]:
        """Move sequences from the highest slots to free ones; return those that must get their awaited token first.

        A move costs nothing; to wait for a token costs a step, so nobody waits whose place a newcomer is about to take.
        """
        awaited: set[Sequence] = set()
        count, highest = len(self._running), max(self._running, default=-1)
        if highest < count:
            return awaited
        soon = count + min(len(self._waiting), self.cache.num_free)
        is_sparse = 1 + highest >= MOVING_FROM * soon
        for sequence in self._running.values():
            assert sequence.slot is not None
            if sequence.slot < count or sequence.num_begun < sequence.num_context:
                continue
            if not sequence.is_awaited:
                sequence.slot = self.cache.move(sequence.slot)
            elif is_sparse and sequence.slot >= soon:
                awaited.add(sequence)
        self._running = {s.slot: s for s in self._running.values() if s.slot is not None}
        return awaited

    def _with_room(self, decode: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
        """Make room for a token of each of `decode`; return those that still run."""
        for sequence in decode:
            while sequence.slot is not None and not self.cache.grow(sequence.slot, sequence.num_begun + 1):
                self._preempt(max(self._running.values(), key=lambda other: (other.request.priority, other.order)))
                self.num_preempted += 1
        return tuple(sequence for sequence in decode if sequence.slot is not None)

    def _preempt(self, sequence: Sequence) -> None:
        """Free a sequence's slot; it waits again. Calls in flight still give their tokens, and write before others."""
        self._free(sequence)
        self._preempted.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._hold(sequence)
        del self._running[sequence.slot]
        self.cache.give_back(sequence.slot)
        sequence.slot = None

    def _add_chunk(self, chunks: list[PrefillChunk], sequence: Sequence, left: int) -> int:
        """Plan the next of a sequence's tokens to prefill, at most `left`; return how many are left then."""
        num_tokens = min(left, sequence.num_context - sequence.num_begun)
        if num_tokens <= 0:
            return left
        chunks.append(PrefillChunk(sequence, num_tokens))
        if self.cache.shares_begun:
            self._hold(sequence, num_tokens)
        return left - num_tokens

    def _hold(self, sequence: Sequence, num_planned: int | None = None) -> None:
        """Record which of the sequence's cached tokens other prompts may reuse.

        num_planned: tokens that the planned step computes, after those in flight; None: only computed ones count.
        """
        assert sequence.slot is not None
        num_tokens = sequence.num_computed if num_planned is None else sequence.num_begun + num_planned
        ids = sequence.request.prompt_ids
        if self._reuses_answers and num_tokens > len(ids):
            ids = np.concatenate([ids, np.array(sequence.output_ids, np.int64)])
        self.cache.hold(sequence.slot, ids[: min(num_tokens, self._max_seq_len - 1)])
