"""ResponseWriter: chunks of one answer → the events of a streamed response, and the response as it stands.

An answer's reasoning, its text and each of its calls are items of the output, one behind the other.
"""

from __future__ import annotations

import copy
import time
from typing import Any
from uuid import uuid4

from deepseek_triton.clients import Chunk, ToolCall
from deepseek_triton.gateway.apis.openai_chat.forced_call import ForcedCall
from deepseek_triton.gateway.apis.openai_chat.tools import Function
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.openai_forms import log_prob_rows
from deepseek_triton.gateway.record import TokenUsage

Event = dict[str, Any]


class ResponseWriter:
    """Writes one response.

    response: as `translate.begun_response` makes it; it is kept up to date. forced: the functions of which the answer
    is a call. usage: where the answer's tokens are counted.
    """

    def __init__(
        self,
        response: dict[str, Any],
        usage: TokenUsage,
        forced: tuple[Function, ...] = (),
        has_log_probs: bool = False,
    ) -> None:
        self.response = response
        self._usage = usage
        self._forced = ForcedCall(forced) if forced else None
        self._has_log_probs = has_log_probs
        self._open: _OpenItem | None = None
        self._events: list[Event] = []  # not given yet
        self._num_events = 0

    def begin(self) -> list[Event]:
        """The events before the first token."""
        self._tell("response.created")
        self._tell("response.in_progress")
        return self._take()

    def push(self, chunk: Chunk) -> list[Event]:
        """The events of what `chunk` adds. Raises `ApiError` for an answer that the server gave up."""
        if chunk.finish_reason not in ("", "stop", "length"):
            raise ApiError(502, f"the model's server ended the answer: {chunk.finish_reason}")
        text, calls = chunk.text, chunk.tool_calls
        if self._forced is not None:
            text, calls = "", self._forced.push(chunk.text, is_last=bool(chunk.finish_reason))
        if chunk.reasoning:
            self._add("reasoning", chunk.reasoning)
        if text:
            self._add("message", text, answer_rows(chunk) if self._has_log_probs else [])
        for call in calls:
            self._add_call(call)
        if chunk.finish_reason:
            self._end(is_cut=chunk.finish_reason == "length")
        return self._take()

    def fail(self, error: ApiError) -> list[Event]:
        """The events that end a response in which `error` has come."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._close("incomplete")
        self._finish("failed", error={"code": code, "message": error.message})
        self._tell("response.failed")
        return self._take()

    def cancel(self) -> None:
        """Say that the response was ended from outside, or that its client has left: nobody reads events any more."""
        self._close("incomplete")
        self._finish("cancelled")

    def _add(self, kind: str, text: str, rows: list[dict[str, Any]] | None = None) -> None:
        """Add text to the open item if it is of this kind; else to a new one."""
        if self._open is None or self._open.kind != kind:
            self._open_item(_OpenItem(kind, len(self.response["output"])))
        assert self._open is not None
        self._events += self._open.add(text, rows)

    def _add_call(self, call: ToolCall) -> None:
        if call.id is not None:
            self._open_item(_OpenItem("function_call", len(self.response["output"]), call))
        if self._open is None or self._open.kind != "function_call":
            raise ApiError(502, "the model's server gave a part of a call that never began")
        self._events += self._open.add(call.arguments)

    def _open_item(self, item: _OpenItem) -> None:
        self._close("completed")
        self._open = item
        self.response["output"].append(item.item)
        self._events += item.begin()

    def _close(self, status: str) -> None:
        if self._open is not None:
            self._events += self._open.close(status)
            self._open = None

    def _end(self, *, is_cut: bool) -> None:
        if not self.response["output"]:  # the answer is empty, which is an answer too
            self._add("message", "")
        self._close("incomplete" if is_cut else "completed")
        self._finish("incomplete" if is_cut else "completed")
        if is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._tell(f"response.{self.response['status']}")

    def _finish(self, status: str, error: dict[str, Any] | None = None) -> None:
        usage = self._usage
        self.response["status"], self.response["error"] = status, error
        self.response["completed_at"] = int(time.time()) if status == "completed" else None
        self.response["usage"] = {
            "input_tokens": usage.input,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.output,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.input + usage.output,
        }

    def _tell(self, kind: str) -> None:
        self._events.append({"type": kind, "response": copy.deepcopy(self.response)})

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        for event in events:
            event["sequence_number"] = self._num_events
            self._num_events += 1
        return events


def answer_rows(chunk: Chunk) -> list[dict[str, Any]]:
    """The log probabilities of a chunk's tokens, without those of the reasoning that ends in it."""
    rows = log_prob_rows(chunk)
    ends = [index for index, row in enumerate(rows) if row["token"] == "</think>"]
    return rows[ends[-1] + 1 :] if ends else rows


# kind → the prefix of its id, the type of its part, and the events of its text.
_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}
_TEXT_EVENTS = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}


class _OpenItem:
    """The output's last item, to which text is added."""

    def __init__(self, kind: str, index: int, call: ToolCall | None = None) -> None:
        self.kind = kind
        self._index = index
        self._text = ""
        self._rows: list[dict[str, Any]] = []
        item: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{uuid4().hex}", "type": kind, "status": "in_progress"}
        if call is not None:
            item |= {"call_id": call.id, "name": call.name, "arguments": ""}
        else:
            item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        self.item = item

    def add(self, text: str, rows: list[dict[str, Any]] | None = None) -> list[Event]:
        """The events of `text`; rows: the log probabilities of its tokens, which only a message has."""
        self._text += text
        self._rows += rows or []
        self._write()
        if not text:
            return []
        logprobs = {"logprobs": rows or []} if self.kind == "message" else {}
        return [{"type": f"{_TEXT_EVENTS[self.kind]}.delta", **self._place(), "delta": text, **logprobs}]

    def begin(self) -> list[Event]:
        """The events that begin the item."""
        item = copy.deepcopy(self.item)
        events: list[Event] = [{"type": "response.output_item.added", "output_index": self._index, "item": item}]
        if self.kind in _PARTS:
            events.append({"type": "response.content_part.added", **self._place(), "part": self._part()})
        return events

    def close(self, status: str) -> list[Event]:
        """The events that end the item."""
        self.item["status"] = status
        self._write()
        events: list[Event] = [{"type": f"{_TEXT_EVENTS[self.kind]}.done", **self._place()}]
        if self.kind == "function_call":
            events[0] |= {"arguments": self._text, "name": self.item["name"]}
        else:
            events[0] |= {"text": self._text, **({"logprobs": self._rows} if self.kind == "message" else {})}
            part = copy.deepcopy(self._part())
            events.append({"type": "response.content_part.done", **self._place(), "part": part})
        item = copy.deepcopy(self.item)
        return [*events, {"type": "response.output_item.done", "output_index": self._index, "item": item}]

    def _place(self) -> dict[str, Any]:
        place = {"item_id": self.item["id"], "output_index": self._index}
        return {**place, "content_index": 0} if self.kind in _PARTS else place

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = {"type": _PARTS[self.kind], "text": self._text}
        return {**part, "annotations": [], "logprobs": list(self._rows)} if self.kind == "message" else part

    def _write(self) -> None:
        if self.kind == "function_call":
            self.item["arguments"] = self._text
        else:
            self.item["content"] = [self._part()]
