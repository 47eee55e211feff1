"""The engine loop: schedule → begin → emit → finish, on one thread.

It knows runners, requests and sinks; it knows nothing of Triton, of text, or of how a runner computes. What faces the
clients is in request_loop.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from deepseek_triton.ensemble.engine.budget import PrefillBudget
from deepseek_triton.ensemble.engine.cache.choose import cache_manager
from deepseek_triton.ensemble.engine.decoding import Outcome
from deepseek_triton.ensemble.engine.liveness import Acknowledgements
from deepseek_triton.ensemble.engine.pipeline import Call, Failure, StepPipeline
from deepseek_triton.ensemble.engine.request_loop import RequestLoop
from deepseek_triton.ensemble.engine.runners.base import OutOfMemoryError, PagedRunner, Runner
from deepseek_triton.ensemble.engine.runners.one_step import pipelined
from deepseek_triton.ensemble.engine.scheduler import EngineStep, Scheduler
from deepseek_triton.ensemble.engine.sequence import Request, Sequence
from deepseek_triton.ensemble.guided import GuideError
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling import Sampled, SamplingError
from deepseek_triton.ensemble.text.errors import one_line, without_frames

log = logging.getLogger(__name__)

EMIT_SHARE = 0.8  # sending responses may go on until this share of the average decode time has passed
MIN_EMIT_SHARE = 0.2  # the minimum time for sending, as a share of the average decode time


class EngineLoop(RequestLoop):
    """Runs every submitted request to its end on a runner.

    Args:
        runner: the model; the loop closes it.
        settings, acknowledgements, clock: see RequestLoop.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        settings: EngineSettings,
        acknowledgements: Acknowledgements,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            runner.max_num_seqs,
            runner.max_seq_len,
            runner.vocab_size,
            settings=settings,
            acknowledgements=acknowledgements,
            clock=clock,
        )
        self._runner = runner
        self._pipeline = StepPipeline(pipelined(runner), clock)
        self._budget = PrefillBudget(settings.max_num_batched_tokens, settings.max_prefill_stall)
        self._scheduler = Scheduler(
            runner.max_num_seqs,
            runner.max_seq_len,
            self._budget,
            cache_manager(runner, is_reused=settings.prefix_reuse != "off"),
            reuses_answers=settings.prefix_reuse == "all",
        )
        self.metrics.cache_blocks = self._scheduler.cache.num_blocks

    def step(self) -> None:
        """Schedule and begin a step, send the last step's tokens while the runner computes, finish a step."""
        step = self._scheduler.schedule()
        self._prepare(step)
        for failure in self._pipeline.begin(step, self._scheduler.positions()):
            self._failed_call(failure)
        self._emit()
        self._finish_step()

    def _wait_s(self) -> float | None:
        return 0.0 if self._requests or not self._pipeline.is_empty else None

    def _enqueue(self, request: Request) -> None:
        self._scheduler.add(request.sequences[0])  # _add_siblings adds the others

    def _release(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)

    def _num_waiting(self) -> int:
        return self._scheduler.num_waiting

    def _num_waiting_before(self, priority: int) -> int:
        return self._scheduler.num_waiting_before(priority)

    def _recover(self) -> None:
        self._pipeline.discard()
        self._scheduler.recover()

    def _close(self) -> None:
        self._runner.close()

    def _note_load(self) -> None:
        self.metrics.slots_used = self._scheduler.num_running
        self.metrics.sequences_waiting = self._scheduler.num_waiting
        self.metrics.cache_blocks_free = self._scheduler.cache.num_free_blocks
        self.metrics.preemptions_total = self._scheduler.num_preempted

    def _prepare(self, step: EngineStep) -> None:
        now = self.clock()
        try:
            for copy in step.copies:
                self._runner.copy_prefix(copy.source, copy.target, copy.num_tokens)
        except Exception as error:  # without the copies the prompts are computed in full
            log.error("copying a prefix failed", exc_info=error)
            self._scheduler.forget_copies(step.admitted)
        for change in step.tables:
            assert isinstance(self._runner, PagedRunner)
            self._runner.set_blocks(change.slot, change.first, change.blocks)
        for sequence in step.admitted:
            if sequence.first_scheduled_at is not None:  # it was preempted
                continue
            sequence.first_scheduled_at = now
            self.metrics.prompt_tokens_total += len(sequence.request.prompt_ids)
            self.metrics.prefix_hit_tokens_total += sequence.num_computed
            self.metrics.prefix_hits_total += sequence.num_computed > 0
            if sequence.index == 0:
                sequence.request.num_cached_tokens = sequence.num_computed
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
        for sequence, outcome in self._pipeline.decide():
            self._take(sequence, outcome, self.clock())

    def _add_siblings(self, call: Call) -> None:
        """Queue a request's other sequences when the first has computed their common prompt for the first time.

        It computes it again if it was preempted before it had a token.
        """
        for part in call.parts:
            if part.gives_token and part.sequence.index == 0 and part.sequence.finish_reason is None:
                for sibling in part.sequence.request.sequences[1:]:
                    if not sibling.is_added:
                        self._scheduler.add(sibling)

    def _take(self, sequence: Sequence, outcome: Outcome, now: float) -> None:
        """Append the next token to a sequence, or end it if the outcome is an error."""
        if sequence.finish_reason is not None:  # another outcome of the step ended the request
            return
        request, previous, num_tokens = sequence.request, sequence.last_token_at, len(sequence.output_ids)
        if isinstance(outcome, Sampled):
            try:
                sequence.append(outcome, now)
            except GuideError as error:
                outcome = without_frames(error)
            except Exception as error:  # from the stop words
                outcome = error
        if not isinstance(outcome, Sampled):
            if not isinstance(outcome, SamplingError | GuideError):
                log.error("choosing a token failed", exc_info=outcome)
            if len(request.sequences) == 1:
                self._fail(request, one_line(outcome), "invalid" if isinstance(outcome, GuideError) else "internal")
                return
            sequence.finish("error")
        elif previous is None:
            if sequence.index == 0:
                self.metrics.time_to_first_token_seconds.observe(now - request.arrived_at)
        else:
            self.metrics.inter_token_latency_seconds.observe(now - previous)
        self.metrics.generated_tokens_total += len(sequence.output_ids) - num_tokens
        if sequence.finish_reason is not None:
            self._release(sequence)

    def _emit(self) -> None:
        now = self.clock()
        self._acknowledge(now)
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

    def _failed_call(self, failure: Failure) -> None:
        what, error = failure.call.kind, failure.error
        log.error("%s failed", what, exc_info=error)
        running = [sequence for sequence in failure.call.sequences if sequence.finish_reason is None]
        requests = {sequence.request.stream_id: sequence.request for sequence in running}
        newest_first = sorted(requests, key=lambda stream_id: requests[stream_id].arrived_at)[::-1]
        # If memory ran out, ending the newest request may be enough for the others.
        for stream_id in newest_first[:1] if isinstance(error, OutOfMemoryError) else newest_first:
            self._fail(requests[stream_id], f"{what} failed: {one_line(error)}")
        self._scheduler.recover()
