"""Pipelining of steps: the next step begins before the last one's tokens are known, so that the runner never idles.

A step is a decode and its prefills. Steps are begun and finished in order. A step that begins ahead continues from
tokens that only the runner knows yet. A sequence whose token must be chosen on the host is left out until it is chosen;
if its guide's mask takes long, its logits are kept and the others go on. A sequence whose awaited token turns out to be
its last has one result too many, which is dropped. This module knows neither clients nor how slots are assigned.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from deepseek_triton.ensemble.engine.decoding import Outcome, accept_sampled, choose_on_host, device_sampling
from deepseek_triton.ensemble.engine.runners.base import (
    LAST_TOKEN,
    Decoded,
    DeviceSampling,
    Logits,
    PipelinedRunner,
    PromptChunk,
)
from deepseek_triton.ensemble.engine.scheduler import EngineStep, PrefillChunk
from deepseek_triton.ensemble.engine.sequence import Sequence as TokenSequence
from deepseek_triton.ensemble.guided import wait_for_any

log = logging.getLogger(__name__)

# Maximum share of the decoding sequences that a step may leave out because the host must choose their token first.
# Those then get half as many tokens as the others. If the share is larger, all sequences wait.
MAX_SHARE_LEFT_OUT = 0.25
# How long a call's tokens wait for masks in all: as a rule a mask is there before the logits that it is for.
MASK_WAIT_S = 0.005
IDLE_WAIT_S = 0.01  # how long the loop waits for a mask while there is nothing else to do
LATE_SHARE = 0.02  # if waiting took less than this share of a call's time, the call had ended before the wait


class StepPart(NamedTuple):
    """One sequence's part of a call: it fills `num_tokens` positions of the slot, and gives a token if `gives_token`.

    row: index of the token in the call's results. sampling: the device sampling; None: the host chooses from logits.
    """

    sequence: TokenSequence
    num_tokens: int
    row: int
    gives_token: bool
    sampling: DeviceSampling | None


@dataclass(frozen=True)
class Call:
    """One decode or prefill of the runner; begun_at is in seconds."""

    kind: Literal["decode", "prefill"]
    parts: Sequence[StepPart]
    begun_at: float

    @property
    def sequences(self) -> list[TokenSequence]:
        """The sequences that it computes."""
        return [part.sequence for part in self.parts]

    @property
    def num_tokens(self) -> int:
        """Number of positions that it fills."""
        return sum(part.num_tokens for part in self.parts)


@dataclass(frozen=True)
class StepResult:
    """A call's outcomes for the sequences that still run, and its duration on the runner in seconds.

    is_late: the call had ended before the wait for it began, so `seconds` is an upper bound.
    """

    call: Call
    outcomes: list[tuple[TokenSequence, Outcome]]
    seconds: float
    is_late: bool


@dataclass(frozen=True)
class Failure:
    """A call that could not be begun or finished."""

    call: Call
    error: Exception


class StepPipeline:
    """Begins and finishes steps."""

    def __init__(self, runner: PipelinedRunner, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._clock = clock
        self._steps: deque[list[Call]] = deque()  # in flight, the earliest first
        self._is_step_begun = False  # whether the last `begin` began a step
        self._device_sampled: set[TokenSequence] = set()  # sequences whose token the last step samples on the device
        self._undecided: dict[TokenSequence, Logits] = {}  # whose mask isn't computed yet, with the logits [vocab_size]
        self._finished_at = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether no step is in flight."""
        return not self._steps

    def busy_since(self, now: float) -> float:
        """Return when the runner began the call that it computes now; `now` if it is idle."""
        return max(self._steps[0][0].begun_at, self._finished_at) if self._steps else now

    def begin(self, step: EngineStep, positions: Mapping[int, int]) -> list[Failure]:
        """Begin the calls of `step` that can be begun, and return the failures.

        `positions` is that of Scheduler.positions: one for every slot.
        """
        now = self._clock()
        groups = [step.prefill] if self._runner.packs_prompts else [(chunk,) for chunk in step.prefill]
        planned = [Call("decode", self._decode_parts(step.decode), now)]
        planned += [Call("prefill", [*map(self._prefill_part, group, itertools.count())], now) for group in groups]
        begun, failures = [], []
        for call in planned:
            if not call.parts:
                continue
            try:
                self._start(call, positions)
            except Exception as error:  # any error of the runner ends the call's sequences, not the engine
                failures.append(Failure(call, error))
                continue
            begun.append(call)
            for part in call.parts:
                part.sequence.num_in_flight += part.num_tokens
                part.sequence.num_awaited += part.gives_token
        if begun or failures:  # a failed call may have been computed in part
            self._device_sampled = {part.sequence for call in begun for part in call.parts if part.sampling is not None}
        self._is_step_begun = bool(begun)
        if begun:
            self._steps.append(begun)
        return failures

    def finish(self) -> Iterator[StepResult | Failure]:
        """Wait for the earliest step and yield its results, call by call.

        Yields nothing if the last `begin` began a step and the runner can take another one before the earliest ends.
        """
        if not self._steps or (self._is_step_begun and len(self._steps) < self._runner.steps_in_flight):
            return
        for number, call in enumerate(self._steps[0]):
            waited_at = self._clock()
            try:
                decoded = self._runner.finish_decode() if call.kind == "decode" else self._runner.finish_prefill()
                now = self._clock()
                outcomes = self._outcomes(call, decoded)
            except Exception as error:  # the later steps in flight depend on this call
                self.discard(number)
                yield Failure(call, error)
                return
            for part in call.parts:
                part.sequence.num_computed += part.num_tokens
                part.sequence.num_in_flight -= part.num_tokens
                part.sequence.num_awaited -= part.gives_token and part.sequence not in self._undecided
            seconds, self._finished_at = now - max(call.begun_at, self._finished_at), now
            yield StepResult(call, outcomes, seconds, is_late=now - waited_at < LATE_SHARE * seconds)
        self._steps.popleft()

    def decide(self) -> list[tuple[TokenSequence, Outcome]]:
        """Return a token or an error for each sequence whose mask has come since its logits did.

        Waits for a mask if no step is in flight.
        """
        if self.is_empty:
            wait_for_any([sequence.guide for sequence in self._undecided if sequence.guide], IDLE_WAIT_S)
        outcomes: list[tuple[TokenSequence, Outcome]] = []
        for sequence, logits in list(self._undecided.items()):
            is_dropped = sequence.finish_reason is not None or sequence.slot is None
            outcome = None if is_dropped else choose_on_host(sequence, logits)
            if not is_dropped and outcome is None:
                continue
            del self._undecided[sequence]
            sequence.num_awaited -= 1
            if outcome is not None:
                outcomes.append((sequence, outcome))
        return outcomes

    def discard(self, num_finished: int = 0) -> None:
        """Drop all steps in flight; each sequence keeps the state after its last finished call.

        num_finished: calls of the earliest step that are finished; their sequences may still wait for a mask.
        """
        calls = [call for step in self._steps for call in step][num_finished:]
        for part in (part for call in calls for part in call.parts):
            part.sequence.num_in_flight = part.sequence.num_awaited = 0
            self._undecided.pop(part.sequence, None)
        self._steps.clear()
        try:
            self._runner.abandon()
        except Exception as error:  # if the runner is broken, the next call fails too
            log.error("abandoning steps failed", exc_info=error)

    def _decode_parts(self, sequences: Sequence[TokenSequence]) -> list[StepPart]:
        """Return the parts of the sequences that can decode now; none if too many would be left out."""
        parts, num_left_out = [], 0
        for sequence in sequences:
            if sequence in self._undecided or (sequence.num_awaited and sequence.ends_with_awaited):
                continue
            sampling = self._sampling(sequence)
            if sequence.num_awaited and (sampling is None or sequence not in self._device_sampled):
                num_left_out += 1
                continue
            assert sequence.slot is not None
            parts.append(StepPart(sequence, 1, sequence.slot, True, sampling))
        return [] if num_left_out > MAX_SHARE_LEFT_OUT * (num_left_out + len(parts)) else parts

    def _prefill_part(self, chunk: PrefillChunk, row: int) -> StepPart:
        sequence = chunk.sequence
        # After a preemption the last token of the output is known, and is decoded next.
        gives_token = not sequence.output_ids and sequence.num_begun + chunk.num_tokens >= sequence.num_context
        sampling = self._sampling(sequence) if gives_token and self._runner.packs_prompts else None
        return StepPart(sequence, chunk.num_tokens, row, gives_token, sampling)

    def _sampling(self, sequence: TokenSequence) -> DeviceSampling | None:
        sampling = device_sampling(sequence)
        return sampling if sampling is not None and self._runner.can_sample(sampling) else None

    def _start(self, call: Call, positions: Mapping[int, int]) -> None:
        logits_rows = [part.row for part in call.parts if part.gives_token and part.sampling is None]
        if call.kind == "prefill":
            chunks = [_prompt_chunk(part.sequence, part.num_tokens) for part in call.parts]
            self._runner.start_prefill(chunks, [part.sampling for part in call.parts], logits_rows)
            return
        num_rows = 1 + max(part.row for part in call.parts)
        ids = [0] * num_rows
        samplings: list[DeviceSampling | None] = [None] * num_rows
        for sequence, _, row, _, sampling in call.parts:
            ids[row] = LAST_TOKEN if sequence.num_awaited else sequence.output_ids[-1]
            samplings[row] = sampling
        where = np.array([positions[slot] for slot in range(num_rows)], np.int64)
        self._runner.start_decode(np.array(ids, np.int64), where, samplings, logits_rows)

    def _outcomes(self, call: Call, decoded: Decoded) -> list[tuple[TokenSequence, Outcome]]:
        """Return a token or an error for each of the call's sequences that still run, get a token and have a mask."""
        tokens, log_probs = decoded.tokens.tolist(), decoded.log_probs.tolist()
        rows = iter(decoded.logits)
        outcomes: list[tuple[TokenSequence, Outcome]] = []
        wait_until = time.monotonic() + MASK_WAIT_S
        for sequence, _, row, gives_token, sampling in call.parts:
            own_logits = next(rows) if gives_token and sampling is None else None
            if not gives_token or sequence.finish_reason is not None:  # it ended while the call ran
                continue
            if own_logits is None:
                outcomes.append((sequence, accept_sampled(sequence, tokens[row], log_probs[row])))
                continue
            outcome = choose_on_host(sequence, own_logits, max(0.0, wait_until - time.monotonic()))
            if outcome is None:
                self._undecided[sequence] = own_logits.copy()  # these are valid until the runner's next call
            else:
                outcomes.append((sequence, outcome))
        return outcomes


def _prompt_chunk(sequence: TokenSequence, num_tokens: int) -> PromptChunk:
    start = sequence.num_begun
    assert sequence.slot is not None
    return PromptChunk(sequence.slot, sequence.context()[start : start + num_tokens], start)
