"""The loop of an engine that asks another model for its tokens, one thread for each sequence under way.

The other model schedules its batches itself. Here wait those beyond `max_num_seqs`, by priority; stop words, time
limits, acknowledgements and abandoned clients are as with a runner.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from deepseek_triton.ensemble.engine.liveness import Acknowledgements
from deepseek_triton.ensemble.engine.remote.model import Ask, RemoteError, RemoteModel, RemoteTokens
from deepseek_triton.ensemble.engine.request_loop import RequestLoop
from deepseek_triton.ensemble.engine.sequence import Request, Sequence
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling.seeds import sequence_seed
from deepseek_triton.ensemble.text.errors import one_line

log = logging.getLogger(__name__)

TICK_S = 0.02  # the longest wait for a token before time limits, acknowledgements and heartbeats are looked at again
MAX_SEED = 2**63  # exclusive; of torch's generators, as a signed number
ENDS = ("stop", "length")


class RemoteLoop(RequestLoop):
    """Runs every submitted request to its end on another model.

    Args:
        model: its limits. ask: gives one sequence's tokens.
        settings, acknowledgements, clock: see RequestLoop.
    """

    def __init__(
        self,
        model: RemoteModel,
        ask: Ask,
        *,
        settings: EngineSettings,
        acknowledgements: Acknowledgements,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            model.max_num_seqs,
            model.max_seq_len,
            model.vocab_size,
            settings=settings,
            acknowledgements=acknowledgements,
            clock=clock,
        )
        self._ask = ask
        self._waiting: list[Sequence] = []  # most urgent first
        self._running: set[Sequence] = set()  # those that the other model still computes, ended ones included
        self._num_queued = 0

    def step(self) -> None:
        """Begin what waits, and send what is ready."""
        now = self.clock()
        while self._waiting and len(self._running) < self.metrics.slots:
            self._begin(self._waiting.pop(0), now)
        self._acknowledge(now)
        for request in list(self._requests.values()):
            self._attempt(self._serve, request, now)

    def _wait_s(self) -> float | None:
        return TICK_S if self._requests else None

    def _enqueue(self, request: Request) -> None:
        for sequence in request.sequences:
            self._num_queued += 1
            sequence.order = self._num_queued
        self._waiting += request.sequences
        self._waiting.sort(key=lambda sequence: (sequence.request.priority, sequence.order))

    def _release(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)

    def _num_waiting(self) -> int:
        return len(self._waiting)

    def _num_waiting_before(self, priority: int) -> int:
        return sum(sequence.request.priority <= priority for sequence in list(self._waiting))

    def _note_load(self) -> None:
        self.metrics.slots_used = len(self._running)
        self.metrics.sequences_waiting = len(self._waiting)

    def _recover(self) -> None:
        self._waiting.clear()

    def _close(self) -> None:
        """The threads end with the process: each waits for the other model."""

    def _begin(self, sequence: Sequence, now: float) -> None:
        request = sequence.request
        sequence.first_scheduled_at = now
        if sequence.index == 0:
            self.metrics.prompt_tokens_total += len(request.prompt_ids)
            self.metrics.queue_time_seconds.observe(now - request.arrived_at)
        self._running.add(sequence)
        threading.Thread(target=self._read, args=(sequence,), name="remote sequence", daemon=True).start()

    def _read(self, sequence: Sequence) -> None:
        """Pass one sequence's tokens on to the loop's thread, until there are no more."""
        error: Exception | None = None
        try:
            remote = sequence.request.remote
            assert remote is not None
            parameters = {**remote.parameters, "max_tokens": sequence.request.max_new_tokens}
            if (seed := sequence.request.params.seed) is not None:
                parameters["seed"] = sequence_seed(seed, sequence.index) % MAX_SEED
            for tokens in self._ask(remote.text, parameters, lambda: sequence.finish_reason is None):
                self._inbox.put(partial(self._take, sequence, tokens))
        except Exception as caught:  # the client needs an answer, whatever it is
            error = caught
        self._inbox.put(partial(self._end, sequence, error))

    def _take(self, sequence: Sequence, remote: RemoteTokens) -> None:
        """Append tokens that have come to a sequence that hasn't ended."""
        now = self.clock()
        for sampled in remote.tokens:
            if sequence.finish_reason is not None:
                return
            previous, num_tokens = sequence.last_token_at, len(sequence.output_ids)
            sequence.append(sampled, now)
            if previous is not None:
                self.metrics.inter_token_latency_seconds.observe(now - previous)
            elif sequence.index == 0:
                self.metrics.time_to_first_token_seconds.observe(now - sequence.request.arrived_at)
            self.metrics.generated_tokens_total += len(sequence.output_ids) - num_tokens
        if remote.finish_reason is None or sequence.finish_reason is not None:
            return
        for reason in ENDS:
            if remote.finish_reason == reason:
                sequence.finish("stop" if reason == "stop" else "length")
                return
        self._fail_sequence(sequence, f"the model ended the answer early: {remote.finish_reason}")

    def _end(self, sequence: Sequence, error: Exception | None) -> None:
        """Give the sequence's place to the next one; it fails if it hasn't ended."""
        self._running.discard(sequence)
        if sequence.finish_reason is not None:
            return
        if error is not None and not isinstance(error, RemoteError):
            log.error("asking the model failed", exc_info=error)
        self._fail_sequence(sequence, "the model sent no end of the answer" if error is None else one_line(error))

    def _fail_sequence(self, sequence: Sequence, message: str) -> None:
        if len(sequence.request.sequences) == 1:
            self._fail(sequence.request, message)
        else:
            sequence.finish("error")
