"""Chunks → the events of a streamed chat completion."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from deepseek_triton.clients import Chunk, ToolCall
from deepseek_triton.gateway.apis.openai_chat.answer import log_probs_form
from deepseek_triton.gateway.apis.openai_chat.body import ChatBody
from deepseek_triton.gateway.apis.openai_chat.forced_call import ForcedCall
from deepseek_triton.gateway.apis.openai_chat.tools import Function
from deepseek_triton.gateway.apis.wire import sse
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.openai_forms import finish_form, usage_form
from deepseek_triton.gateway.record import RequestRecord


class ChatStream:
    """An `EventSource`. chunks: of all the request's sequences, whose tokens `record` counts already."""

    def __init__(
        self,
        body: ChatBody,
        chunks: AsyncGenerator[Chunk, None],
        record: RequestRecord,
        forced: tuple[Function, ...] = (),
    ) -> None:
        options = body.stream_options
        self._chunks = chunks
        self._record = record
        self._forced = forced
        self._sequences: dict[int, _Sequence] = {}
        self._has_log_probs = bool(body.logprobs)
        self._ends_with_usage = bool(options and options.include_usage)
        self._has_usage = bool(options and options.continuous_usage_stats)
        self._head = {
            "id": f"chatcmpl-{record.request_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": None,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Give the events of the answers."""
        async for chunk in self._chunks:
            sequence = self._sequences.get(chunk.sequence_index)
            if sequence is None:
                sequence = self._sequences[chunk.sequence_index] = _Sequence(self._forced)
            choice = sequence.choice(chunk)
            if self._has_log_probs:
                choice["logprobs"] = log_probs_form(chunk)
            yield self._event([choice])
        if self._ends_with_usage:
            yield self._usage()
        yield sse.DONE

    def failure(self, error: ApiError) -> bytes:
        """The tokens so far, and the error."""
        usage = self._usage() if self._ends_with_usage else b""
        return usage + sse.event(error.body("")) + sse.DONE

    def _event(self, choices: list[dict[str, Any]]) -> bytes:
        data: dict[str, Any] = {**self._head, "choices": choices}
        if self._has_usage:
            data["usage"] = usage_form(self._record.usage)
        elif self._ends_with_usage:
            data["usage"] = None
        return sse.event(data)

    def _usage(self) -> bytes:
        return sse.event({**self._head, "choices": [], "usage": usage_form(self._record.usage)})


class _Sequence:
    """What was sent of one sequence."""

    def __init__(self, forced: tuple[Function, ...]) -> None:
        self._forced = ForcedCall(forced) if forced else None
        self._is_begun = False
        self._has_calls = False

    def choice(self, chunk: Chunk) -> dict[str, Any]:
        """What `chunk` adds."""
        text, calls = chunk.text, chunk.tool_calls
        if self._forced is not None:
            text, calls = "", self._forced.push(chunk.text, is_last=bool(chunk.finish_reason))
        self._has_calls |= bool(calls)
        delta: dict[str, Any] = {}
        if not self._is_begun:
            self._is_begun = True
            delta = {"role": "assistant", "content": ""}
        if text:
            delta["content"] = text
        if chunk.reasoning:
            delta["reasoning_content"] = chunk.reasoning
        if calls:
            delta["tool_calls"] = [_call_delta(call) for call in calls]
        reason = finish_form(chunk.finish_reason, has_calls=self._has_calls)
        return {"index": chunk.sequence_index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _call_delta(call: ToolCall) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.id is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}
