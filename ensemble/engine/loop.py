"""The engine loop: schedule → begin → emit → finish, on one thread.

It knows runners, requests and sinks; it knows nothing of Triton, of text, or of how a runner computes. Other threads
use `submit` and `stop` only.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from deepseek_triton.ensemble.engine.budget import PrefillBudget
from deepseek_triton.ensemble.engine.decoding import Outcome
from deepseek_triton.ensemble.engine.liveness import Acknowledgements, Liveness
from deepseek_triton.ensemble.engine.metrics import EngineMetrics
from deepseek_triton.ensemble.engine.pipeline import Call, Failure, StepPipeline
from deepseek_triton.ensemble.engine.runners.base import OutOfMemoryError, Runner
from deepseek_triton.ensemble.engine.runners.one_step import pipelined
from deepseek_triton.ensemble.engine.scheduler import EngineStep, Scheduler
from deepseek_triton.ensemble.engine.sequence import FailureKind, Request, Sequence
from deepseek_triton.ensemble.guided import GuideError
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling import Sampled, SamplingError
from deepseek_triton.ensemble.text.errors import one_line

log = logging.getLogger(__name__)


EMIT_SHARE = 0.8  # sending responses may go on until this share of the average decode time has passed
MIN_EMIT_SHARE = 0.2  # the minimum time for sending, as a share of the average decode time


class QueueFullError(Exception):
    """The queue is full."""


class EngineLoop:
    """Runs every submitted request to its end.

    The thread survives all errors: an error of one sequence or of one client's sink ends its request; an error of the
    engine itself ends all current requests.

    Args:
        runner: the model; the loop closes it.
        settings: scheduling and timeouts.
        acknowledgements: from the detokenizer.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        settings: EngineSettings,
        acknowledgements: Acknowledgements,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = EngineMetrics(slots=runner.max_num_seqs)
        self.clock = clock
        self._runner = runner
        self._pipeline = StepPipeline(pipelined(runner), clock)
        self._max_queue_size = settings.max_queue_size
        self._budget = PrefillBudget(settings.max_num_batched_tokens, settings.max_prefill_stall)
        self._scheduler = Scheduler(
            runner.max_num_seqs,
            runner.max_seq_len,
            self._budget,
            reuses_prompts=settings.prefix_reuse != "off",
            reuses_answers=settings.prefix_reuse == "all",
        )
        self._liveness = Liveness(settings.cancel_after_s)
        self._acknowledgements = acknowledgements
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._requests: OrderedDict[int, Request] = OrderedDict()  # by stream id, least recently answered first
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the loop's thread."""
        self._thread.start()

    def close(self) -> None:
        """Fail every request, stop the thread and close the runner."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: the prompt is empty, holds an unknown id, or leaves no room to generate.
            QueueFullError: max_queue_size sequences wait already.
        """
        length, limit = len(request.prompt_ids), self._runner.max_seq_len
        if length == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if length >= limit:
            raise ValueError(f"the prompt has {length} tokens, the context holds {limit}; shorten the prompt")
        low, high = int(request.prompt_ids.min()), int(request.prompt_ids.max())
        if low < 0 or high >= self._runner.vocab_size:
            raise ValueError(f"input_ids must lie in 0 … {self._runner.vocab_size - 1}, got {low if low < 0 else high}")
        if self._scheduler.num_waiting + self._inbox.qsize() >= self._max_queue_size:
            self.metrics.requests_refused_total += 1
            raise QueueFullError(f"queue is full (max_queue_size={self._max_queue_size}); retry later")
        request.max_new_tokens = min(request.params.max_tokens or limit, limit - length)
        self._inbox.put(lambda: self._add(request))

    def stop(self, request_id: str, done: Callable[[], None]) -> None:
        """Cancel the unfinished requests with `request_id`, if any, then call `done`."""
        self._inbox.put(lambda: self._stop(request_id, done))

    def run(self) -> None:
        """Run the loop; returns after `close`."""
        while self._receive():
            try:
                self.step()
            except Exception as error:  # unexpected, but every client must get an error
                log.error("a step failed", exc_info=error)
                self._pipeline.discard()
                self._fail_all(f"the engine failed: {one_line(error)}", "internal")
        while not self._inbox.empty():  # messages that arrived after `close`
            self._handle(self._inbox.get())
        self._fail_all("the engine is shutting down", "unavailable")
        self._runner.close()

    def step(self) -> None:
        """Schedule and begin a step, send the last step's tokens while the runner computes, finish a step."""
        step = self._scheduler.schedule()
        self._prepare(step)
        for failure in self._pipeline.begin(step, self._scheduler.positions()):
            self._failed_call(failure)
        self._emit()
        self._finish_step()

    def _receive(self) -> bool:
        """Handle the messages of other threads; wait for one if there is no work. Returns False on `close`."""
        while True:
            self._note_load()  # requests may have ended since the last step
            try:
                message = self._inbox.get(block=not self._requests and self._pipeline.is_empty)
            except queue.Empty:
                return True
            if message is None:
                return False
            self._handle(message)

    def _handle(self, message: Callable[[], None] | None) -> None:
        try:
            if message is not None:
                message()
        except Exception as error:
            log.error("a message to the engine failed", exc_info=error)

    def _note_load(self) -> None:
        self.metrics.slots_used = self._scheduler.num_running
        self.metrics.sequences_waiting = self._scheduler.num_waiting

    def _prepare(self, step: EngineStep) -> None:
        now = self.clock()
        try:
            for copy in step.copies:
                self._runner.copy_prefix(copy.source, copy.target, copy.num_tokens)
        except Exception as error:  # without the copies the prompts are computed in full
            log.error("copying a prefix failed", exc_info=error)
            self._scheduler.forget_copies(step.admitted)
        for sequence in step.admitted:
            sequence.first_scheduled_at = now
            self.metrics.prompt_tokens_total += len(sequence.request.prompt_ids)
            self.metrics.prefix_hit_tokens_total += sequence.num_computed
            self.metrics.prefix_hits_total += sequence.num_computed > 0
            if sequence.index == 0:
                self.metrics.queue_time_seconds.observe(now - sequence.request.arrived_at)
        self._note_load()

    def _finish_step(self) -> None:
        has_decode, num_tokens, prefill_s = False, 0, 0.0
        for result in self._pipeline.finish():
            if isinstance(result, Failure):
                self._failed_call(result)
                continue
            if result.call.kind == "decode":
                has_decode = True
                self._budget.observe_decode(result.seconds, at_most=result.is_late)
            else:
                num_tokens += result.call.num_tokens
                prefill_s += result.seconds
                self._add_siblings(result.call)
            now = self.clock()
            for sequence, outcome in result.outcomes:
                self._take(sequence, outcome, now)
        if has_decode:
            self._budget.observe_prefill(num_tokens, prefill_s)

    def _add_siblings(self, call: Call) -> None:
        """Queue a request's other sequences when the first has computed their common prompt."""
        for part in call.parts:
            if part.gives_token and part.sequence.index == 0 and part.sequence.finish_reason is None:
                for sibling in part.sequence.request.sequences[1:]:
                    self._scheduler.add(sibling)

    def _take(self, sequence: Sequence, outcome: Outcome, now: float) -> None:
        """Append the next token to a sequence, or end it if the outcome is an error."""
        if sequence.finish_reason is not None:  # another outcome of the step ended the request
            return
        request, previous, num_tokens = sequence.request, sequence.last_token_at, len(sequence.output_ids)
        if isinstance(outcome, Sampled):
            try:
                sequence.append(outcome, now)
            except Exception as error:  # from the guide or the stop words
                outcome = error
        if not isinstance(outcome, Sampled):
            if not isinstance(outcome, SamplingError | GuideError):
                log.error("choosing a token failed", exc_info=outcome)
            if len(request.sequences) == 1:
                self._fail(request, one_line(outcome))
                return
            sequence.finish("error")
        elif previous is None:
            if sequence.index == 0:
                self.metrics.time_to_first_token_seconds.observe(now - request.arrived_at)
        else:
            self.metrics.inter_token_latency_seconds.observe(now - previous)
        self.metrics.generated_tokens_total += len(sequence.output_ids) - num_tokens
        if sequence.finish_reason is not None:
            self._scheduler.remove(sequence)

    def _emit(self) -> None:
        now = self.clock()
        for stream_id in self._acknowledgements.drain():
            if request := self._requests.get(stream_id):
                self._liveness.acknowledged(request, now)
        # Each response takes this thread about 0.1 ms. Sending must not delay the runner: when the time is up, the
        # other requests wait for the next step and send the tokens of both steps in one response.
        decode_s = self._budget.decode_s
        end = max(self._pipeline.busy_since(now) + EMIT_SHARE * decode_s, now + MIN_EMIT_SHARE * decode_s)
        for request in list(self._requests.values()):
            num_responses = self.metrics.responses_total
            self._attempt(self._serve, request, now)
            if self.metrics.responses_total > num_responses:
                if request.stream_id in self._requests:
                    self._requests.move_to_end(request.stream_id)
                if decode_s and self.clock() > end:
                    return

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
        self._scheduler.add(request.sequences[0])  # _add_siblings adds the others

    def _stop(self, request_id: str, done: Callable[[], None]) -> None:
        for request in [r for r in self._requests.values() if r.request_id == request_id]:
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
                self._scheduler.remove(sequence)

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
                self._scheduler.remove(sequence)
        try:
            request.sink.fail(message, kind)
        except Exception as error:  # the client can't be reached
            log.error("reporting an error failed", exc_info=error)

    def _failed_call(self, failure: Failure) -> None:
        what, error = failure.call.kind, failure.error
        log.error("%s failed", what, exc_info=error)
        running = [sequence for sequence in failure.call.sequences if sequence.finish_reason is None]
        requests = {sequence.request.stream_id: sequence.request for sequence in running}
        newest_first = sorted(requests, reverse=True)
        # If memory ran out, ending the newest request may be enough for the others.
        for stream_id in newest_first[:1] if isinstance(error, OutOfMemoryError) else newest_first:
            self._fail(requests[stream_id], f"{what} failed: {one_line(error)}")
