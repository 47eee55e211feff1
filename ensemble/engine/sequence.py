"""Request and Sequence: the state of a client's request and of each of its output sequences.

A request has one or more sequences of the same prompt. Output goes to the client through the request's Sink. This
module knows nothing of Triton.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.thinking import Thinking
from deepseek_triton.ensemble.guided import BackgroundGuide
from deepseek_triton.ensemble.protocol.contract import FinishReason
from deepseek_triton.ensemble.protocol.error_kind import FailureKind as FailureKind
from deepseek_triton.ensemble.protocol.progress import LogProbs, StreamHead, Update
from deepseek_triton.ensemble.sampling import Sampled, Sampler, SamplingParams
from deepseek_triton.ensemble.text.bad_words import BadWords
from deepseek_triton.ensemble.text.stop_words import StopMatcher

NEVER = math.inf
RANDOM_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)  # as of uuid4()


class Sink(Protocol):
    """Receives a request's output. Only the engine's thread calls it."""

    def send(self, request: Request, updates: Items[Update]) -> None:
        """Send `updates` as one response, the last one if `request.is_finished`; no updates: a heartbeat."""

    def fail(self, message: str, kind: FailureKind) -> None:
        """End the request with an error."""

    def is_cancelled(self) -> bool:
        """Return whether the client is known to have disconnected."""


@dataclass(eq=False)
class Sequence:
    """One output sequence and its state.

    order, is_added: its place among the sequences of its priority, and whether the scheduler has given it one.
    num_computed: tokens in the slot's KV cache.
    num_in_flight: tokens after them that calls in flight compute.
    num_awaited: output tokens that calls in flight give, or whose logits are known and whose mask isn't.
    num_ready: output tokens that may be sent; later ones may be part of a stop word.
    num_sent: output tokens that were sent.
    num_cut_chars: characters to remove from the end of the text, because they belong to a stop word.
    """

    request: Request
    index: int
    sampler: Sampler
    stop_matcher: StopMatcher | None = None
    bad_words: BadWords | None = None
    guide: BackgroundGuide | None = None
    thinking: Thinking | None = None
    slot: int | None = None
    order: int = 0
    is_added: bool = False
    num_computed: int = 0
    num_in_flight: int = 0
    num_awaited: int = 0
    num_ready: int = 0
    num_sent: int = 0
    num_cut_chars: int = 0
    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    total_log_prob: float = 0.0
    first_scheduled_at: float | None = None  # times are in seconds on the loop's clock
    first_token_at: float | None = None
    last_token_at: float | None = None
    finish_reason: FinishReason | None = None
    is_reported: bool = False  # finish_reason was sent

    @property
    def num_begun(self) -> int:
        """Number of tokens computed or in flight, which is the position of the next token."""
        return self.num_computed + self.num_in_flight

    @property
    def num_context(self) -> int:
        """Number of tokens that must be in the KV cache before the next one: prompt and output without its last token.

        Output is computed by prefill only if the sequence was preempted.
        """
        return len(self.request.prompt_ids) + max(0, len(self.output_ids) - 1)

    def context(self) -> NDArray[np.int64]:
        """The first `num_context` tokens."""
        if len(self.output_ids) < 2:
            return self.request.prompt_ids
        return np.concatenate([self.request.prompt_ids, np.array(self.output_ids[:-1], np.int64)])

    @property
    def ends_with_awaited(self) -> bool:
        """Whether the sequence reaches its maximum length with the awaited tokens."""
        return len(self.output_ids) + self.num_awaited >= self.request.max_new_tokens

    @property
    def is_awaited(self) -> bool:
        """Whether calls in flight, or tokens that aren't chosen yet, are the sequence's."""
        return self.num_in_flight > 0 or self.num_awaited > 0

    @property
    def is_guided(self) -> bool:
        """Whether the guide constrains the next token. Reasoning isn't constrained."""
        return self.guide is not None and (self.thinking is None or not self.thinking.is_open)

    @property
    def has_news(self) -> bool:
        """Whether there are tokens or a finish reason to send."""
        return self.num_sent < self.num_ready or (self.finish_reason is not None and not self.is_reported)

    def append(self, sampled: Sampled, now: float) -> None:
        """Append the next token, which was already pushed to the sampler and the bad words.

        An end token (which isn't output), a stop word or the maximum length finishes the sequence.

        Raises:
            GuideError: the guide doesn't allow the token.
        """
        token = sampled.token
        if self.is_guided and self.guide is not None:
            self.guide.accept(token)
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now
        if token in self.sampler.end_ids:
            self.finish("stop")
            return
        self.output_ids.append(token)
        if self.request.params.num_log_probs is not None and sampled.log_prob is not None:
            self.log_probs.append(sampled.log_prob)
            self.total_log_prob += sampled.log_prob
            self.top_log_probs.append(sampled.top)
        if self.thinking is not None:
            self.thinking.push(token)
        if self.stop_matcher is None:
            self.num_ready = len(self.output_ids)
        else:
            state = self.stop_matcher.push(token)
            self.num_ready = state.num_safe_tokens
            if state.is_stop:
                self.num_cut_chars = state.num_cut_chars
                self.finish("stop")
                return
        if len(self.output_ids) >= self.request.max_new_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """Mark the sequence finished and release tokens held for stop-word matching."""
        self.finish_reason = reason
        self.num_ready = len(self.output_ids)
        if self.guide is not None:
            self.guide.close()

    def take_update(self) -> Update:
        """Return what the client doesn't have yet, and mark it as sent."""
        start, end = self.num_sent, self.num_ready
        self.num_sent, self.is_reported = end, self.finish_reason is not None
        request = self.request
        return Update(
            index=self.index,
            ids=tuple(self.output_ids[start:end]),
            num_output_tokens=end,
            finish_reason=self.finish_reason,
            num_cut_chars=self.num_cut_chars,
            log_probs=None if request.params.num_log_probs is None else self._log_probs(start, end),
            times_ns=self._times_ns() if request.returns_times else None,
            num_cached_tokens=request.num_cached_tokens,
            num_reasoning_tokens=0 if self.thinking is None else self.thinking.num_tokens,
        )

    def _log_probs(self, start: int, end: int) -> LogProbs:
        top = tuple(self.top_log_probs[start:end]) if self.request.params.num_log_probs else ()
        return LogProbs(tuple(self.log_probs[start:end]), self.total_log_prob, top)

    def _times_ns(self) -> tuple[int, int, int, int]:
        times = (self.request.arrived_at, self.first_scheduled_at, self.first_token_at, self.last_token_at)
        arrival, scheduled, first, last = (0 if time is None else int(time * 1e9) for time in times)
        return arrival, scheduled, first, last


@dataclass(frozen=True)
class RemoteRequest:
    """A prompt for a model that takes texts: the text, and the parameters for every sequence of it."""

    text: str
    parameters: Mapping[str, Any]


@dataclass(eq=False)
class Request:
    """One client's request.

    stream_id: unique among the requests of all engines.
    request_id: the client's; may be empty or used twice.
    stop_key: the client's; who stops the request must know it. Empty: the client has none.
    prompt_ids: [n] int64.
    queue_deadline, deadline: when the request must have a slot and must be finished, in seconds on the loop's clock.
    remote: what another server's model is asked, where one computes the answer.
    """

    stream_id: int
    request_id: str
    prompt_ids: NDArray[np.int64]
    params: SamplingParams
    sink: Sink
    is_streamed: bool = False
    expects_acknowledgement: bool = False
    head: StreamHead | None = None
    stop_key: str = ""
    priority: int = 1
    arrived_at: float = 0.0
    queue_deadline: float = NEVER
    deadline: float = NEVER
    returns_times: bool = False
    returns_input_count: bool = True
    returns_output_count: bool = True
    max_new_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt: found in a slot when the first sequence got its own
    sequences: list[Sequence] = field(default_factory=list)
    unacknowledged: list[float] = field(default_factory=list)  # send times of unacknowledged responses, oldest first
    last_sent_at: float = 0.0
    remote: RemoteRequest | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every sequence is finished."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def may_be_stopped_by(self, request_id: str, stop_key: str) -> bool:
        """Return whether who knows these may end the request: its id and key, or an id that nobody guesses."""
        if request_id != self.request_id:
            return False
        has_key = bool(self.stop_key) and hmac.compare_digest(self.stop_key.encode(), stop_key.encode())
        return has_key or RANDOM_ID.fullmatch(request_id) is not None

    @property
    def is_waiting(self) -> bool:
        """Whether no sequence has had a slot yet."""
        return all(sequence.first_scheduled_at is None for sequence in self.sequences)
