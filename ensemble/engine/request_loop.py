"""The part of an engine's loop that faces clients: requests in, responses, heartbeats and errors out, on one thread.

What computes the tokens is a subclass's: `loop.py` has a runner, `remote/loop.py` asks another Triton model. Other
threads use `submit`, `stop` and `is_healthy` only.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from numpy import integer
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.liveness import Acknowledgements, Liveness
from deepseek_triton.ensemble.engine.metrics import EngineMetrics
from deepseek_triton.ensemble.engine.sequence import FailureKind, Request, Sequence
from deepseek_triton.ensemble.protocol.contract import RETRY
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.text.errors import one_line

log = logging.getLogger(__name__)

STEP_LIMIT_S = 300.0  # a step that takes longer hangs; a step of a large model on a CPU takes tens of seconds


class QueueFullError(Exception):
    """The queue is full."""


class RequestLoop(ABC):
    """Answers every submitted request.

    The thread survives all errors: an error of one sequence or of one client's sink ends its request; an error of the
    engine itself ends all current requests.

    Args:
        max_num_seqs: sequences that run at once. max_seq_len: tokens of a prompt and its answer.
        vocab_size: in tokens.
        settings: scheduling and timeouts.
        acknowledgements: from the detokenizer.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_seq_len: int,
        vocab_size: int,
        *,
        settings: EngineSettings,
        acknowledgements: Acknowledgements,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_seq_len, self.vocab_size = max_seq_len, vocab_size
        self.metrics = EngineMetrics(slots=max_num_seqs)
        self.clock = clock
        self._max_queue_size = settings.max_queue_size
        self._liveness = Liveness(settings.cancel_after_s, acknowledgements.life_since)
        self._acknowledgements = acknowledgements
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._requests: OrderedDict[int, Request] = OrderedDict()  # by stream id, least recently answered first
        self._step_began_at: float | None = None  # None while there is no work
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    @abstractmethod
    def step(self) -> None:
        """Do what can be done now: begin what waits, take what has come, send what is ready."""

    @abstractmethod
    def _wait_s(self) -> float | None:
        """Return for how many seconds a message may be waited for; None: until one comes, for there is no work."""

    @abstractmethod
    def _enqueue(self, request: Request) -> None:
        """Let the request's sequences wait for their turn."""

    @abstractmethod
    def _release(self, sequence: Sequence) -> None:
        """Stop computing a sequence, which has ended."""

    @abstractmethod
    def _num_waiting(self) -> int:
        """Return the number of sequences that wait. For other threads too."""

    @abstractmethod
    def _num_waiting_before(self, priority: int) -> int:
        """Return the number of those that are at least as urgent. For other threads too."""

    @abstractmethod
    def _note_load(self) -> None:
        """Publish how many sequences run and wait."""

    @abstractmethod
    def _recover(self) -> None:
        """Give up what was begun, after a step that failed."""

    @abstractmethod
    def _close(self) -> None:
        """Free what computes."""

    def _acknowledge(self, now: float) -> None:
        """Take note of the responses that have arrived."""
        for stream_id in self._acknowledgements.drain():
            if request := self._requests.get(stream_id):
                self._liveness.acknowledged(request, now)

    def start(self) -> None:
        """Start the loop's thread."""
        self._thread.start()

    def close(self) -> None:
        """Fail every request, stop the thread and close the runner."""
        self._inbox.put(None)
        self._thread.join()

    def is_healthy(self) -> bool:
        """Return whether the thread lives, and no step hangs. For other threads."""
        began_at = self._step_began_at
        return self._thread.is_alive() and (began_at is None or self.clock() - began_at < STEP_LIMIT_S)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: as `check_prompt`.
            QueueFullError: max_queue_size sequences that are as urgent, or twice as many in all, wait already.
        """
        self.check_prompt(request.prompt_ids)
        length, limit = len(request.prompt_ids), self.max_seq_len
        if self._is_full(request.priority):
            self.metrics.requests_refused_total += 1
            raise QueueFullError(f"queue is full (max_queue_size={self._max_queue_size}){RETRY}")
        request.max_new_tokens = min(request.params.max_tokens or limit, limit - length)
        self._inbox.put(lambda: self._add(request))

    def _is_full(self, priority: int) -> bool:
        """Return whether no further request of `priority` may wait.

        Less urgent ones don't count for it, unless twice as many wait as may.
        """
        arriving = self._inbox.qsize()
        num_waiting = self._num_waiting() + arriving
        if num_waiting < self._max_queue_size or num_waiting >= 2 * self._max_queue_size:
            return num_waiting >= self._max_queue_size
        return self._num_waiting_before(priority) + arriving >= self._max_queue_size

    def check_prompt(self, prompt_ids: NDArray[integer[Any]]) -> None:
        """Check that `prompt_ids` [n] can be computed.

        Raises:
            ValueError: the prompt is empty, holds an unknown id, or leaves no room to generate.
        """
        length, limit = len(prompt_ids), self.max_seq_len
        if length == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if length >= limit:
            raise ValueError(f"the prompt has {length} tokens, the context holds {limit}; shorten the prompt")
        low, high = int(prompt_ids.min()), int(prompt_ids.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"input_ids must lie in 0 … {self.vocab_size - 1}, got {low if low < 0 else high}")

    def stop(self, request_id: str, stop_key: str, done: Callable[[], None]) -> None:
        """Cancel the unfinished requests with this id and key, if any, then call `done`."""
        self._inbox.put(lambda: self._stop(request_id, stop_key, done))

    def run(self) -> None:
        """Run the loop; returns after `close`."""
        while self._receive():
            self._step_began_at = self.clock()
            try:
                self.step()
            except Exception as error:  # unexpected, but every client must get an error
                log.error("a step failed", exc_info=error)
                self._recover()
                self._fail_all(f"the engine failed: {one_line(error)}", "internal")
            self._step_began_at = None
        while not self._inbox.empty():  # messages that arrived after `close`
            self._handle(self._inbox.get())
        self._fail_all("the engine is shutting down", "unavailable")
        self._close()

    def _receive(self) -> bool:
        """Handle the messages of other threads; wait for one if there is no work. Returns False on `close`."""
        is_first = True
        while True:
            self._note_load()  # requests may have ended since the last step
            wait_s = self._wait_s()
            if wait_s is not None and not is_first:
                wait_s = 0.0
            try:
                message = self._inbox.get(block=wait_s != 0.0, timeout=wait_s or None)
            except queue.Empty:
                return True
            if message is None:
                return False
            self._handle(message)
            is_first = False

    def _handle(self, message: Callable[[], None] | None) -> None:
        try:
            if message is not None:
                message()
        except Exception as error:
            log.error("a message to the engine failed", exc_info=error)

    def _attempt(self, action: Callable[[Request, float], None], request: Request, now: float) -> None:
        """Call `action`; an error ends the request, not the engine."""
        try:
            action(request, now)
        except Exception as error:
            log.error("answering a request failed", exc_info=error)
            self._fail(request, f"the response could not be sent: {one_line(error)}")

    def _serve(self, request: Request, now: float) -> None:
        """Send a request's ready tokens or a heartbeat. Nothing may be sent after a request's last response."""
        self._check(request, now)
        if request.stream_id not in self._requests:
            return
        if request.is_finished:
            self._finish(request)
            return
        if request.is_streamed and self._liveness.may_send(request):
            updates = [sequence.take_update() for sequence in request.sequences if sequence.has_news]
            if updates:
                self._liveness.sent(request, now)
                self.metrics.responses_total += 1
                request.sink.send(request, updates)
        if self._liveness.needs_heartbeat(request, now):
            self._liveness.sent(request, now)
            request.sink.send(request, ())

    def _check(self, request: Request, now: float) -> None:
        """Cancel a request whose client has disconnected; fail one that has timed out."""
        if request.is_finished:
            return
        if self._liveness.is_abandoned(request, now):
            self._cancel(request)
        elif now > request.deadline or (request.is_waiting and now > request.queue_deadline):
            self.metrics.requests_expired_total += 1
            waited = f"{(now - request.arrived_at) * 1e3:.0f} ms"
            num_tokens = sum(len(sequence.output_ids) for sequence in request.sequences)
            where = "waiting for a slot" if request.is_waiting else f"having generated {num_tokens} tokens"
            self._fail(request, f"the request timed out after {waited}, {where}", "unavailable")

    def _add(self, request: Request) -> None:
        self._requests[request.stream_id] = request
        request.last_sent_at = self.clock()
        self.metrics.requests_total += 1
        self._enqueue(request)

    def _stop(self, request_id: str, stop_key: str, done: Callable[[], None]) -> None:
        for request in [r for r in self._requests.values() if r.may_be_stopped_by(request_id, stop_key)]:
            self._attempt(self._end_early, request, self.clock())
        done()

    def _end_early(self, request: Request, now: float) -> None:
        if not request.is_finished:
            self._cancel(request)
        self._finish(request)

    def _cancel(self, request: Request) -> None:
        self.metrics.requests_cancelled_total += 1
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish("cancelled")
                self._release(sequence)

    def _finish(self, request: Request) -> None:
        del self._requests[request.stream_id]
        self.metrics.responses_total += 1
        request.sink.send(request, [sequence.take_update() for sequence in request.sequences if sequence.has_news])

    def _fail_all(self, message: str, kind: FailureKind) -> None:
        for request in list(self._requests.values()):
            self._fail(request, message, kind)

    def _fail(self, request: Request, message: str, kind: FailureKind = "internal") -> None:
        self._requests.pop(request.stream_id, None)  # absent if its last response could not be sent
        self.metrics.requests_failed_total += 1
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish("error")
                self._release(sequence)
        try:
            request.sink.fail(message, kind)
        except Exception as error:  # the client can't be reached
            log.error("reporting an error failed", exc_info=error)
