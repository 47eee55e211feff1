"""The engine's loop: schedule → run → emit, on one thread.

It knows runners, sequences and sinks; it knows nothing of Triton, of text, or of how a runner computes. Other threads
reach it through `submit` and `stop` only.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from ensemble.engine.runners.base import GreedyRunner, Runner
from ensemble.engine.scheduler import Scheduler, Step
from ensemble.engine.sequence import Sequence
from ensemble.sampling import SamplingError

log = logging.getLogger(__name__)

# Responses of one stream on their way to the detokenizer. One would wait for each acknowledgement; with two, the next
# is under way meanwhile, and what is ready while both are out travels together.
MAX_UNACKNOWLEDGED = 2


class Acknowledgements(Protocol):
    """Where the detokenizer says what it has received."""

    def drain(self) -> Iterable[int]:
        """Sequence ids, one for each response received since the last call."""


class EngineLoop:
    """Runs every submitted sequence to its end.

    Args:
        runner: the model; the loop closes it.
        end_ids: tokens that end a sequence.
        prefill_chunk: prompt tokens computed in one step.
        acknowledgements: the detokenizer's.
        cancel_after_s: a stream whose response stays unacknowledged so long has lost its client.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        end_ids: Iterable[int],
        prefill_chunk: int,
        acknowledgements: Acknowledgements,
        cancel_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._end_ids = frozenset(end_ids)
        self._scheduler = Scheduler(runner.num_slots, prefill_chunk)
        self._acknowledgements = acknowledgements
        self._cancel_after_s = cancel_after_s
        self._clock = clock
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._by_id: dict[int, Sequence] = {}
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work, on a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """End every sequence with an error, then the thread, then the runner."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            ValueError: the prompt is empty, holds an unknown id, or leaves no room to generate.
        """
        length, limit = len(sequence.prompt_ids), self._runner.max_seq_len
        if length == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if length >= limit:
            raise ValueError(f"the prompt has {length} tokens, the context holds {limit}; shorten the prompt")
        low, high = int(sequence.prompt_ids.min()), int(sequence.prompt_ids.max())
        if low < 0 or high >= self._runner.vocab_size:
            raise ValueError(f"input_ids must lie in 0 … {self._runner.vocab_size - 1}, got {low if low < 0 else high}")
        sequence.max_new_tokens = min(sequence.params.max_tokens or limit, limit - length)
        self._inbox.put(lambda: self._add(sequence))

    def stop(self, request_id: str, done: Callable[[], None]) -> None:
        """Cancel the sequences of `request_id`, if there are any left, then call `done`."""
        self._inbox.put(lambda: self._stop(request_id, done))

    def run(self) -> None:
        """The loop itself; returns after `close`."""
        while self._receive():
            step = self._scheduler.schedule()
            if step:
                self._run(step)
                self._emit()
        for sequence in self._scheduler.sequences:
            self._fail(sequence, "the engine is shutting down")
        self._runner.close()

    def _receive(self) -> bool:
        """Take in what other threads asked for, waiting if there is nothing else to do; False: close."""
        is_idle = not self._scheduler.sequences
        while True:
            try:
                message = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            if message is None:
                return False
            message()
            is_idle = not self._scheduler.sequences

    def _run(self, step: Step) -> None:
        if step.prefill is not None:
            try:
                self._prefill(step.prefill, step.prefill_tokens)
            except Exception as error:  # whatever a runner raises ends this request, not the engine
                self._failed_step("prefill", (step.prefill,), error)
        if step.decode:
            try:
                self._decode(step.decode)
            except Exception as error:
                self._failed_step("decode", step.decode, error)

    def _prefill(self, sequence: Sequence, num_tokens: int) -> None:
        assert sequence.slot is not None
        start = sequence.num_computed
        ids = sequence.prompt_ids[start : start + num_tokens]
        logits = self._runner.prefill(sequence.slot, ids, start)
        sequence.num_computed += num_tokens
        if sequence.is_prefilled:
            self._append(sequence, logits)

    def _decode(self, sequences: tuple[Sequence, ...]) -> None:
        by_slot = {s.slot: s for s in sequences if s.slot is not None}
        num_rows = max(by_slot) + 1
        ids, positions = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
        for slot, position in self._scheduler.positions().items():
            if slot < num_rows:
                positions[slot] = position
        for slot, sequence in by_slot.items():
            ids[slot] = sequence.output_ids[-1]
        if isinstance(self._runner, GreedyRunner) and all(s.params.is_greedy for s in sequences):
            tokens, scores = self._runner.decode_greedy(ids, positions)
            for slot, sequence in by_slot.items():
                sequence.num_computed += 1
                if np.isfinite(scores[slot]):
                    sequence.append(int(tokens[slot]), self._end_ids)
                else:
                    self._fail(sequence, str(SamplingError.not_finite()))
            return
        logits = self._runner.decode(ids, positions)
        for slot, sequence in by_slot.items():
            sequence.num_computed += 1
            self._append(sequence, logits[slot])

    def _append(self, sequence: Sequence, logits: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
        try:
            sequence.append(sequence.sampler.sample(logits).token, self._end_ids)
        except SamplingError as error:
            self._fail(sequence, str(error))

    def _emit(self) -> None:
        for sequence_id in self._acknowledgements.drain():
            if (sequence := self._by_id.get(sequence_id)) and sequence.unacknowledged:
                sequence.unacknowledged.pop(0)
        now = self._clock()
        for sequence in list(self._by_id.values()):
            if sequence.finish_reason is None and self._is_abandoned(sequence, now):
                sequence.finish_reason = "cancelled"
            if sequence.finish_reason is not None:
                self._finish(sequence)
            elif sequence.stream and sequence.pending and len(sequence.unacknowledged) < MAX_UNACKNOWLEDGED:
                self._send(sequence, now)

    def _is_abandoned(self, sequence: Sequence, now: float) -> bool:
        if sequence.sink.is_cancelled():
            return True
        return bool(sequence.unacknowledged) and now - sequence.unacknowledged[0] > self._cancel_after_s

    def _send(self, sequence: Sequence, now: float) -> None:
        ids, sequence.pending = sequence.pending, []
        if sequence.expects_acknowledgement:
            sequence.unacknowledged.append(now)
        sequence.sink.send(sequence, ids)

    def _add(self, sequence: Sequence) -> None:
        self._by_id[sequence.sequence_id] = sequence
        self._scheduler.add(sequence)

    def _stop(self, request_id: str, done: Callable[[], None]) -> None:
        stopped = [s for s in self._by_id.values() if s.request_id == request_id]
        for sequence in stopped:
            sequence.finish_reason = "cancelled"
            self._finish(sequence)
        done()

    def _finish(self, sequence: Sequence) -> None:
        self._forget(sequence)
        sequence.sink.send(sequence, sequence.pending)

    def _fail(self, sequence: Sequence, message: str) -> None:
        self._forget(sequence)
        sequence.sink.fail(message)

    def _failed_step(self, what: str, sequences: Iterable[Sequence], error: Exception) -> None:
        log.error("%s failed", what, exc_info=error)
        for sequence in sequences:
            if sequence.sequence_id in self._by_id:
                self._fail(sequence, f"{what} failed: {error}")

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._by_id[sequence.sequence_id]
