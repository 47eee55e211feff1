"""Admission: turns a client's options and prompt into a Request that the loop can run.

Every error of a request is found here, before the request waits for a slot. Compiling a guide may take seconds;
`is_quick` says so beforehand. It knows the model's tokenizer and nothing of Triton.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.sequence import NEVER, Request, Sequence, Sink
from deepseek_triton.ensemble.engine.thinking import Thinking, ThinkingTags
from deepseek_triton.ensemble.guided import BackgroundGuide, GuideCompiler, MaskThreads
from deepseek_triton.ensemble.protocol.progress import PromptInfo, StreamHead
from deepseek_triton.ensemble.protocol.request_options import RANGES, default_of
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling import Sampler, SamplingParams
from deepseek_triton.ensemble.text.bad_words import BadWords
from deepseek_triton.ensemble.text.reasoning import CLOSE_TAG, OPEN_TAG
from deepseek_triton.ensemble.text.stop_words import StopMatcher
from deepseek_triton.ensemble.text.tokenizer import Tokenizer


class OptionError(ValueError):
    """An option has an invalid value, or one that this model can't use; the message is one line for the client."""


@dataclass(frozen=True)
class RequestOptions:
    """The options of a request; None selects the default of the model or the engine.

    params: the sampling options.
    prompt_info: what the tokenizer reports of the prompt; None for a direct call, which no detokenizer follows.
    Every other field is the request option of that name (ensemble/protocol/request_options.py).
    """

    params: SamplingParams
    prompt_info: PromptInfo | None = None
    stop_words: tuple[str, ...] = default_of("stop_words")
    bad_words: tuple[str, ...] = default_of("bad_words")
    guide_type: str | None = None
    guide: str | None = None
    thinking_token_budget: int | None = None
    stream: bool = default_of("stream")
    exclude_input_in_output: bool = default_of("exclude_input_in_output")
    return_perf_metrics: bool = default_of("return_perf_metrics")
    return_num_input_tokens: bool = default_of("return_num_input_tokens")
    return_num_output_tokens: bool = default_of("return_num_output_tokens")
    priority: int | None = None
    queue_timeout_ms: int | None = None
    timeout_ms: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), RANGES.get(field.name)
            if value is None or allowed is None or field.name == "priority":  # the engine's levels bound it
                continue
            if not allowed.holds(value):
                raise OptionError(f"{field.name} is {value}, must be {allowed.broken_rule(value)}")
        if self.guide is not None and self.guide_type is None:
            raise OptionError("guided_decoding_guide is given without guided_decoding_guide_type; give both")


class Admission:
    """Makes requests for one engine.

    Args:
        directory: holds the model's tokenizer files.
        vocab_size: the model's, in tokens.
        end_ids: the model's end tokens; a request's end_id replaces them.
        settings: the engine's; gives priorities and default timeouts.
    """

    def __init__(self, directory: Path, vocab_size: int, end_ids: Collection[int], settings: EngineSettings) -> None:
        self._tokenizer = Tokenizer.from_directory(directory)
        self._guides = GuideCompiler(directory, vocab_size, end_ids)
        self._masks = MaskThreads()
        self._vocab_size = vocab_size
        self._end_ids = frozenset(end_ids)
        self._settings = settings
        open_id, close_id = (self._tokenizer.token_id(tag) for tag in (OPEN_TAG, CLOSE_TAG))
        self._thinking_tags = None if open_id is None or close_id is None else ThinkingTags(open_id, close_id)

    def is_quick(self, options: RequestOptions) -> bool:
        """Return whether `make_request` takes no long time: no guide has to be compiled."""
        return options.guide_type is None or self._guides.is_cached(options.guide_type, options.guide or "")

    def make_request(
        self,
        stream_id: int,
        request_id: str,
        prompt_ids: NDArray[np.int64],
        options: RequestOptions,
        sink: Sink,
        now: float,
        stop_key: str = "",
    ) -> Request:
        """Make the request for `prompt_ids` [n], which arrived at `now` (seconds) or, as the tokenizer says, before.

        Raises:
            OptionError, GuideError, SamplingError, ValueError: an option is invalid.
        """
        params, info, settings = options.params, options.prompt_info, self._settings
        if params.end_id is not None and params.end_id >= self._vocab_size:
            raise OptionError(f"end_id is {params.end_id}, must be below the vocabulary size, {self._vocab_size}")
        if params.end_id is not None and options.guide_type is not None:
            raise OptionError("end_id can't be combined with guided decoding: the guide decides where text ends")
        if params.min_tokens and options.guide_type is not None:
            raise OptionError("min_tokens can't be combined with guided decoding: the guide decides where text ends")
        self._check_rows(prompt_ids)
        head = None
        if info is not None and info.arrived_at is not None:
            now = min(now, info.arrived_at)
        if info is not None:
            head = StreamHead(info, () if options.exclude_input_in_output else tuple(prompt_ids.tolist()))
        request = Request(
            stream_id=stream_id,
            request_id=request_id,
            prompt_ids=prompt_ids,
            params=params,
            sink=sink,
            is_streamed=options.stream,
            expects_acknowledgement=info is not None,
            head=head,
            stop_key=stop_key,
            priority=self._priority(options.priority),
            arrived_at=now,
            queue_deadline=_deadline(now, options.queue_timeout_ms, settings.queue_timeout_ms),
            deadline=_deadline(now, options.timeout_ms, settings.timeout_ms),
            returns_times=options.return_perf_metrics,
            returns_input_count=options.return_num_input_tokens,
            returns_output_count=options.return_num_output_tokens,
        )
        guides: list[BackgroundGuide | None] = [None] * params.num_return_sequences
        if options.guide_type is not None:
            compiled = self._guides.compile(options.guide_type, options.guide or "")
            guides = [*self._masks.guides(compiled, len(guides))]
        for index, guide in enumerate(guides):
            request.sequences.append(self._make_sequence(request, index, options, guide))
        return request

    def close(self) -> None:
        """Stop computing masks."""
        self._masks.close()

    def _make_sequence(
        self, request: Request, index: int, options: RequestOptions, guide: BackgroundGuide | None
    ) -> Sequence:
        return Sequence(
            request=request,
            index=index,
            sampler=Sampler(options.params, request.prompt_ids.tolist(), self._end_ids, index),
            stop_matcher=StopMatcher(self._tokenizer, options.stop_words) if options.stop_words else None,
            bad_words=BadWords(self._tokenizer, options.bad_words) if options.bad_words else None,
            guide=guide,
            thinking=self._thinking(options),
        )

    def _check_rows(self, prompt_ids: NDArray[np.int64]) -> None:
        """Refuse a token of the tokenizer that the model has no row for, such as the pad token of a training."""
        for index in prompt_ids[prompt_ids >= self._vocab_size][:1].tolist():
            if self._tokenizer.is_added(index):
                token = self._tokenizer.token_text(index)
                raise OptionError(f"the prompt holds {token!r}, for which this model has no embedding: leave it out")

    def _thinking(self, options: RequestOptions) -> Thinking | None:
        info, budget = options.prompt_info, options.thinking_token_budget
        is_open = info is not None and bool(info.is_reasoning_open)
        if self._thinking_tags is None:
            if budget:  # 0 asks for no reasoning, and none comes
                raise OptionError("thinking_token_budget is given, but this model's tokenizer has no token <think>")
            return None
        return Thinking(self._thinking_tags, is_open=is_open, budget=budget)

    def _priority(self, priority: int | None) -> int:
        levels = self._settings.priority_levels
        if priority is None or priority == 0:  # 0 means the default, as in Triton
            return self._settings.default_priority
        if not 1 <= priority <= levels:
            raise OptionError(f"priority is {priority}, must be 1 (most urgent) to {levels}, or 0 for the default")
        return priority


def _deadline(now: float, asked_ms: int | None, default_ms: int) -> float:
    timeout_ms = default_ms if asked_ms is None else asked_ms
    return now + timeout_ms / 1e3 if timeout_ms else NEVER
