"""Steps in flight: the next is begun before the last one's tokens are known, so that the runner never waits for them.

A step is a decode and the prefills beside it. Steps are begun and finished in order. What begins ahead stands for
tokens that only the runner knows: a sequence whose token must be chosen on the host waits for it, one whose token turns
out to be its last has a result too many, which nobody takes. It knows neither clients nor slots' owners.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from deepseek_triton.ensemble.engine.decoding import Outcome, choose_all, sampled, sampling_of
from deepseek_triton.ensemble.engine.runners.base import (
    LAST_TOKEN,
    Decoded,
    DeviceSampling,
    PipelinedRunner,
    PromptChunk,
)
from deepseek_triton.ensemble.engine.scheduler import EngineStep, PrefillChunk
from deepseek_triton.ensemble.engine.sequence import Sequence as TokenSequence

log = logging.getLogger(__name__)

# Of the sequences that could decode, how many may be left out of a step because theirs is a token that the host must
# choose first. They get half as many tokens as the others then; with more of them, all wait.
MAX_SHARE_LEFT_OUT = 0.25
LATE_SHARE = 0.02  # of a call's time: who waits for less of it came when it was over


class Part(NamedTuple):
    """What a call does for one sequence: `num_tokens` positions of its slot, and a token if it `gives_token`.

    row: where the token and its logits are in the call's results. draw: None: its logits come to the host.
    """

    sequence: TokenSequence
    num_tokens: int
    row: int
    gives_token: bool
    sampling: DeviceSampling | None


@dataclass(frozen=True)
class Call:
    """A call of the runner."""

    kind: Literal["decode", "prefill"]
    parts: Sequence[Part]
    begun_at: float

    @property
    def sequences(self) -> list[TokenSequence]:
        """Those that it computes."""
        return [part.sequence for part in self.parts]

    @property
    def num_tokens(self) -> int:
        """Positions that it fills."""
        return sum(part.num_tokens for part in self.parts)


@dataclass(frozen=True)
class StepResult:
    """What a call gave to the sequences that still run, and how long the runner was busy with it.

    is_late: it was over before it was waited for, and took less than `seconds`.
    """

    call: Call
    outcomes: list[tuple[TokenSequence, Outcome]]
    seconds: float
    is_late: bool


@dataclass(frozen=True)
class Failure:
    """A call that could not be begun, or gave nothing."""

    call: Call
    error: Exception


class StepPipeline:
    """Begins and finishes steps."""

    def __init__(self, runner: PipelinedRunner, clock: Callable[[], float]) -> None:
        self._runner = runner
        self._clock = clock
        self._steps: deque[list[Call]] = deque()  # in flight, the earliest first
        self._is_step_begun = False  # by the last `begin`
        self._sampled: set[TokenSequence] = (
            set()
        )  # whose last token the runner has, for it was sampled by the last step
        self._finished_at = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in flight."""
        return not self._steps

    def busy_since(self, now: float) -> float:
        """When the runner began with what it computes now; `now` if that is nothing."""
        return max(self._steps[0][0].begun_at, self._finished_at) if self._steps else now

    def begin(self, step: EngineStep, positions: Mapping[int, int]) -> list[Failure]:
        """Begin what of `step` can be, and tell what failed; `positions` has one for every slot (Scheduler)."""
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
            except Exception as error:  # whatever a runner raises ends its sequences, not the engine
                failures.append(Failure(call, error))
                continue
            begun.append(call)
            for part in call.parts:
                part.sequence.num_in_flight += part.num_tokens
                part.sequence.num_awaited += part.gives_token
        if begun or failures:  # what failed may have been computed in part
            self._sampled = {part.sequence for call in begun for part in call.parts if part.sampling is not None}
        self._is_step_begun = bool(begun)
        if begun:
            self._steps.append(begun)
        return failures

    def finish(self) -> Iterator[StepResult | Failure]:
        """Wait for the earliest step, call by call; not if another may be begun before, and there was one to begin."""
        if not self._steps or (self._is_step_begun and len(self._steps) < self._runner.steps_in_flight):
            return
        for call in self._steps[0]:
            waited_at = self._clock()
            try:
                decoded = self._runner.finish_decode() if call.kind == "decode" else self._runner.finish_prefill()
                now = self._clock()
                outcomes = _outcomes(call, decoded)
            except Exception as error:  # what was begun since builds upon it
                self.discard()
                yield Failure(call, error)
                return
            for part in call.parts:
                part.sequence.num_computed += part.num_tokens
                part.sequence.num_in_flight -= part.num_tokens
                part.sequence.num_awaited -= part.gives_token
            seconds, self._finished_at = now - max(call.begun_at, self._finished_at), now
            yield StepResult(call, outcomes, seconds, is_late=now - waited_at < LATE_SHARE * seconds)
        self._steps.popleft()

    def discard(self) -> None:
        """Forget what is in flight: every sequence is where its last finished call left it."""
        for part in (part for step in self._steps for call in step for part in call.parts):
            part.sequence.num_in_flight = part.sequence.num_awaited = 0
        self._steps.clear()
        try:
            self._runner.abandon()
        except Exception as error:  # if it matters, the next call fails too
            log.error("abandoning steps failed", exc_info=error)

    def _decode_parts(self, sequences: Sequence[TokenSequence]) -> list[Part]:
        """Those that can go on now, if they are enough."""
        parts, num_left_out = [], 0
        for sequence in sequences:
            if sequence.num_awaited and sequence.ends_with_awaited:
                continue
            sampling = self._sampling(sequence)
            if sequence.num_awaited and (sampling is None or sequence not in self._sampled):
                num_left_out += 1
                continue
            assert sequence.slot is not None
            parts.append(Part(sequence, 1, sequence.slot, True, sampling))
        return [] if num_left_out > MAX_SHARE_LEFT_OUT * (num_left_out + len(parts)) else parts

    def _prefill_part(self, chunk: PrefillChunk, row: int) -> Part:
        sequence = chunk.sequence
        gives_token = sequence.num_begun + chunk.num_tokens >= len(sequence.request.prompt_ids)
        sampling = self._sampling(sequence) if gives_token and self._runner.packs_prompts else None
        return Part(sequence, chunk.num_tokens, row, gives_token, sampling)

    def _sampling(self, sequence: TokenSequence) -> DeviceSampling | None:
        sampling = sampling_of(sequence)
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


def _outcomes(call: Call, decoded: Decoded) -> list[tuple[TokenSequence, Outcome]]:
    """A token for each of the call's sequences that still runs, or why it has none."""
    tokens, log_probs = decoded.tokens.tolist(), decoded.log_probs.tolist()
    rows = iter(decoded.logits)
    outcomes: list[tuple[TokenSequence, Outcome]] = []
    left, logits = [], []
    for sequence, _, row, gives_token, sampling in call.parts:
        own_logits = next(rows) if gives_token and sampling is None else None
        if not gives_token or sequence.finish_reason is not None:  # it ended while the call ran
            continue
        if own_logits is None:
            outcomes.append((sequence, sampled(sequence, tokens[row], log_probs[row])))
        else:
            left.append(sequence)
            logits.append(own_logits)
    return outcomes + list(zip(left, choose_all(left, logits), strict=True))


def _prompt_chunk(sequence: TokenSequence, num_tokens: int) -> PromptChunk:
    start = sequence.num_begun
    assert sequence.slot is not None
    return PromptChunk(sequence.slot, sequence.request.prompt_ids[start : start + num_tokens], start)
