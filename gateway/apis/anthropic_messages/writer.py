"""MessageWriter: an answer's parts → the events of a streamed message, and the message as it stands."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from deepseek_triton.clients import Chunk, Generation, ToolCall
from deepseek_triton.gateway.apis.openai_chat.forced_call import ForcedCall
from deepseek_triton.gateway.apis.openai_chat.tools import Function
from deepseek_triton.gateway.apis.wire import sse
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.record import RequestRecord, TokenUsage

PATH = "/v1/messages"
# A kind of block → the field that its deltas add to, the type of these deltas, and the field in them.
DELTAS = {
    "text": ("text", "text_delta", "text"),
    "thinking": ("thinking", "thinking_delta", "thinking"),
    "tool_use": ("input", "input_json_delta", "partial_json"),
}


class MessageWriter:
    """Writes one message. usage: where the answer's tokens are counted. forced: functions of which it is a call."""

    def __init__(self, record: RequestRecord, forced: tuple[Function, ...] = ()) -> None:
        self._usage = record.usage
        self._forced = ForcedCall(forced) if forced else None
        self._text = ""  # of the open block
        self._is_begun = False
        self._is_open = False
        self._has_calls = False
        self._events: list[bytes] = []  # not given yet
        self.message: dict[str, Any] = {
            "id": f"msg_{record.request_id}",
            "type": "message",
            "role": "assistant",
            "model": record.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage_form(record.usage),
        }

    def push(self, part: Chunk | Generation) -> list[bytes]:
        """The events of what `part` adds. Raises `ApiError` for an answer that the server gave up."""
        if part.finish_reason not in ("", "stop", "length"):
            raise ApiError(502, f"the model's server ended the answer: {part.finish_reason}")
        if not self._is_begun:
            self._is_begun = True
            self.message["usage"] = {**usage_form(self._usage), "output_tokens": 0}
            self._tell("message_start", message={**self.message, "content": []})
        text, calls = part.text, part.tool_calls
        if self._forced is not None:
            text, calls = "", self._forced.push(part.text, is_last=bool(part.finish_reason))
        if part.reasoning:
            self._add("thinking", part.reasoning)
        if text:
            self._add("text", text)
        for call in calls:
            self._add_call(call)
        if part.finish_reason:
            self._end(is_cut=part.finish_reason == "length")
        events, self._events = self._events, []
        return events

    def _add(self, kind: str, text: str) -> None:
        """Add text to the open block if it is of this kind; else to a new one."""
        if not self._is_open or self.message["content"][-1]["type"] != kind:
            empty = {"type": "text", "text": ""} if kind == "text" else {"type": kind, kind: "", "signature": ""}
            self._open(empty)
        self._add_text(text)

    def _add_call(self, call: ToolCall) -> None:
        if call.id is not None:
            self._has_calls = True
            self._open({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        if not self._is_open or self.message["content"][-1]["type"] != "tool_use":
            raise ApiError(502, "the model's server gave a part of a call that never began")
        self._add_text(call.arguments)

    def _open(self, block: dict[str, Any]) -> None:
        self._close()
        self._is_open, self._text = True, ""
        self.message["content"].append(block)
        self._tell("content_block_start", index=self._index, content_block=dict(block))

    def _add_text(self, text: str) -> None:
        if text:
            _, kind, field = DELTAS[self.message["content"][-1]["type"]]
            self._text += text
            self._tell("content_block_delta", index=self._index, delta={"type": kind, field: text})

    def _close(self, *, is_cut: bool = False) -> None:
        """Close the open block, if there is one. An input that was cut off is no JSON: its block has the empty one."""
        if not self._is_open:
            return
        block = self.message["content"][-1]
        field = DELTAS[block["type"]][0]
        if field == "input":
            block[field] = _read_input(self._text, is_cut=is_cut)
        else:
            block[field] = self._text
        self._is_open = False
        self._tell("content_block_stop", index=self._index)

    def _end(self, *, is_cut: bool) -> None:
        self._close(is_cut=is_cut)
        reason = "max_tokens" if is_cut else "tool_use" if self._has_calls else "end_turn"
        self.message.update(stop_reason=reason, usage=usage_form(self._usage))
        delta = {"stop_reason": reason, "stop_sequence": None}
        self._tell("message_delta", delta=delta, usage=self.message["usage"])
        self._tell("message_stop")

    @property
    def _index(self) -> int:
        return len(self.message["content"]) - 1

    def _tell(self, kind: str, **fields: Any) -> None:
        self._events.append(sse.event({"type": kind, **fields}, kind))


class MessageStream:
    """An `EventSource`. chunks: of the request's one sequence, whose tokens `record` counts already."""

    def __init__(
        self, chunks: AsyncGenerator[Chunk, None], record: RequestRecord, forced: tuple[Function, ...] = ()
    ) -> None:
        self._chunks = chunks
        self._usage = record.usage
        self._writer = MessageWriter(record, forced)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Give the events of the answer."""
        async for chunk in self._chunks:
            if events := self._writer.push(chunk):
                yield b"".join(events)

    def failure(self, error: ApiError) -> bytes:
        """The tokens so far, and the error."""
        usage = {"type": "message_delta", "delta": {"stop_reason": None, "stop_sequence": None}}
        usage["usage"] = usage_form(self._usage)
        return sse.event(usage, "message_delta") + sse.event(error.body(PATH), "error")


def usage_form(usage: TokenUsage) -> dict[str, Any]:
    """`usage` of a message: its input tokens are those that weren't in the cache."""
    return {
        "input_tokens": usage.input - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.output,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    }


def _read_input(text: str, *, is_cut: bool) -> Any:
    try:
        return json.loads(text or "{}")
    except json.JSONDecodeError:
        if is_cut:
            return {}
        raise ApiError(502, "the model's call has an input that is no JSON") from None
