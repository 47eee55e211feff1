"""Answers and chunks → `text_completion` objects."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from deepseek_triton.clients import Chunk, GenerateRequest, Generation
from deepseek_triton.gateway.apis.openai_completions.body import DEFAULT_MAX_TOKENS, CompletionBody
from deepseek_triton.gateway.apis.wire import sse
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.openai_forms import finish_form, positions, usage_form
from deepseek_triton.gateway.apis.wire.sampling import make_request
from deepseek_triton.gateway.record import RequestRecord


def completion_requests(body: CompletionBody) -> list[GenerateRequest]:
    """A request for each prompt. Raises `ApiError`."""
    return [
        make_request(
            body,
            prompt=prompt,
            max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
            exclude_input_in_output=False if body.echo else None,
            return_log_probs=None if body.logprobs is None else True,
            num_top_log_probs=body.logprobs or None,
        )
        for prompt in body.prompts
    ]


class CompletionForm:
    """Makes the objects of one HTTP request, whose tokens `record` counts."""

    def __init__(self, body: CompletionBody, record: RequestRecord) -> None:
        self._num_sequences = body.n or 1
        self._has_log_probs = body.logprobs is not None
        self._has_tops = bool(body.logprobs)
        self._record = record
        self._head = {
            "id": f"cmpl-{record.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": None,
        }
        self._offsets: dict[int, int] = {}  # of each choice: the characters of its tokens so far

    def whole(self, answers: list[tuple[Generation, ...]]) -> dict[str, Any]:
        """The completion. answers: of each prompt."""
        choices = [self.choice(index, answer) for index, of_prompt in enumerate(answers) for answer in of_prompt]
        return self.object(choices, usage=usage_form(self._record.usage))

    def object(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A completion, or a part of one."""
        return {**self._head, "choices": choices, **more}

    def choice(self, prompt_index: int, answer: Chunk | Generation) -> dict[str, Any]:
        """What `answer` adds to a choice, or a whole one."""
        index = prompt_index * self._num_sequences + answer.sequence_index
        return {
            "index": index,
            "text": answer.text,
            "logprobs": self._log_probs(index, answer) if self._has_log_probs else None,
            "finish_reason": finish_form(answer.finish_reason),
        }

    def usage(self) -> dict[str, Any]:
        """The object that tells the tokens so far."""
        return self.object([], usage=usage_form(self._record.usage))

    def _log_probs(self, index: int, answer: Chunk | Generation) -> dict[str, Any]:
        rows = list(positions(answer))
        offsets = []
        for token, _, _ in rows:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token.token)
        tops = [{top.token: top.log_prob for top in tops} for _, _, tops in rows] if self._has_tops else None
        return {
            "tokens": [token.token for token, _, _ in rows],
            "token_logprobs": [log_prob for _, log_prob, _ in rows],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class CompletionStream:
    """An `EventSource`. chunks: each with its prompt's index."""

    def __init__(
        self, body: CompletionBody, chunks: AsyncGenerator[tuple[int, Chunk], None], record: RequestRecord
    ) -> None:
        options = body.stream_options
        self._form = CompletionForm(body, record)
        self._chunks = chunks
        self._record = record
        self._ends_with_usage = bool(options and options.include_usage)
        self._has_usage = bool(options and options.continuous_usage_stats)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Give the events of the answers."""
        async for prompt_index, chunk in self._chunks:
            more: dict[str, Any] = {"usage": None} if self._ends_with_usage else {}
            if self._has_usage:
                more = {"usage": usage_form(self._record.usage)}
            yield sse.event(self._form.object([self._form.choice(prompt_index, chunk)], **more))
        if self._ends_with_usage:
            yield sse.event(self._form.usage())
        yield sse.DONE

    def failure(self, error: ApiError) -> bytes:
        """The tokens so far, and the error."""
        usage = sse.event(self._form.usage()) if self._ends_with_usage else b""
        return usage + sse.event(error.body("")) + sse.DONE
