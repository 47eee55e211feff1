"""Incremental parser of tool calls in a model's text.

It takes text, split anywhere, and a ToolFormat. It returns the text outside of calls, and the calls as deltas in
OpenAI's streaming form. It knows nothing of tokens, of reasoning or of the available tools.

A call is recognised at its name and the `{` of its arguments. Text that fails to match before that point is returned
unchanged, markers included. After that point the parser doesn't go back: the arguments are the model's own characters
up to the end of the object, or, if the object is never closed, up to the call's end marker or the end of the text.
White space between and after calls is dropped; no other text is lost. The parser never raises on malformed calls.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deepseek_triton.ensemble.text.partial_match import find_first, partial_len
from deepseek_triton.ensemble.text.tool_calls.formats import ToolFormat
from deepseek_triton.ensemble.text.tool_calls.json_object import ObjectScanner
from deepseek_triton.ensemble.text.tool_calls.match import Match, NoMatch, is_name, match


@dataclass(frozen=True)
class ToolCallDelta:
    """An increment of one tool call.

    index: number of the call within the sequence, from 0.
    id, name: set in the call's first delta only.
    arguments: the next characters of the arguments' JSON.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str

    def as_openai(self) -> dict[str, Any]:
        """Return an element of OpenAI's `delta.tool_calls`; for a complete answer, of `message.tool_calls`."""
        function = (
            {"arguments": self.arguments} if self.name is None else {"name": self.name, "arguments": self.arguments}
        )
        head = {} if self.id is None else {"id": self.id, "type": "function"}
        return {"index": self.index, **head, "function": function}


def random_id() -> str:
    """Return an id that is unique across requests: clients send the ids of several answers back in one chat."""
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolCallParser:
    """Splits one sequence's text into text and calls. Where the input is split doesn't change the joined output."""

    def __init__(self, tool_format: ToolFormat, new_id: Callable[[], str] = random_id) -> None:
        self._format = tool_format
        self._new_id = new_id
        self._buffer = ""
        self._step: Callable[[bool], bool] = self._in_text
        self._scanner = ObjectScanner(())
        self._num_scanned = 0
        self._num_calls = 0
        self._text: list[str] = []  # collected by the current push, as are the deltas
        self._deltas: dict[int, ToolCallDelta] = {}
        self._is_final = False

    def push(self, text: str, final: bool = False) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """Return the text, and at most one delta per call, that `text` completes.

        `final` flushes what is held back. Nothing may be pushed after it.
        """
        if self._is_final:
            raise RuntimeError("push after the final push: make a new ToolCallParser for each sequence")
        self._is_final = final
        self._buffer += text
        while self._step(final):
            pass
        ready = "".join(self._text), tuple(self._deltas.values())
        self._text, self._deltas = [], {}
        return ready

    # The states. Each consumes what it recognises of the buffer and sets the next state; False: it needs more text.

    def _in_text(self, final: bool) -> bool:
        found = find_first(self._buffer, self._format.starts)
        if found is None:
            held = 0 if final else partial_len(self._buffer, self._format.starts)
            self._give_text(len(self._buffer) - held)
            return False
        self._give_text(found[0])
        self._step = self._in_opening
        return True

    def _in_opening(self, final: bool) -> bool:
        """Parse a call's opening. The buffer begins with a start marker, perhaps after white space."""
        start = len(self._buffer) - len(self._buffer.lstrip())
        for opening in self._format.openings:
            found = match(opening.steps, self._buffer, start, final)
            if found is NoMatch.UNKNOWN:
                return False
            if isinstance(found, Match):
                self._open_call(found.name)
                if opening.has_arguments:
                    self._drop(found.end - len("{"))
                    self._scanner = ObjectScanner(self._format.stops)
                    self._step = self._in_arguments
                else:
                    self._add_arguments("{}")
                    self._drop(found.end)
                    self._step = self._after_call
                return True
        found = match(self._format.whole, self._buffer, start, final) if self._format.whole else NoMatch.NEVER
        if found is NoMatch.UNKNOWN:
            return False
        if isinstance(found, Match):
            self._num_scanned = found.end - len("{")
            self._scanner = ObjectScanner(self._format.stops)
            self._step = self._in_whole_call
            return True
        self._give_marker()
        return True

    def _in_arguments(self, final: bool) -> bool:
        ready = self._scanner.scan(self._buffer, final)
        self._add_arguments(self._buffer[:ready])
        self._drop(ready)
        self._step = self._in_closing if self._scanner.is_done else self._in_arguments
        return self._scanner.is_done

    def _in_whole_call(self, final: bool) -> bool:
        """Parse a call whose members have another order: it can be read only when the whole object has arrived."""
        start = self._num_scanned
        self._num_scanned += self._scanner.scan(self._buffer[start:], final)
        if not self._scanner.is_done and not final:
            return False
        call = _read_call(self._buffer[self._buffer.index("{") : self._num_scanned])
        if call is None:
            self._give_marker()
            return True
        name, arguments = call
        self._open_call(name)
        self._add_arguments(arguments)
        self._drop(self._num_scanned)
        self._step = self._in_closing
        return True

    def _in_closing(self, final: bool) -> bool:
        end = 0
        for literal in self._format.closing:
            rest = self._buffer[end:].lstrip()
            if rest.startswith(literal):
                end = len(self._buffer) - len(rest) + len(literal)
            elif not final and literal.startswith(rest):
                return False
        self._drop(end)
        self._step = self._after_call
        return True

    def _after_call(self, final: bool) -> bool:
        rest = self._buffer.lstrip()
        section_end = self._format.section_end
        if section_end is not None and rest.startswith(section_end):
            self._drop(len(self._buffer) - len(rest) + len(section_end))
            return True
        if rest.startswith(self._format.starts):
            self._step = self._in_opening
            return True
        expected = [*self._format.starts, *filter(None, [section_end])]
        if not final and any(marker.startswith(rest) for marker in expected):
            return False
        if not rest:
            self._drop(len(self._buffer))
            return False
        self._step = self._in_text
        return True

    def _give_marker(self) -> None:
        """Return the buffer's start marker as text, because no call follows it."""
        start = len(self._buffer) - len(self._buffer.lstrip())
        marker = next(marker for marker in self._format.starts if self._buffer.startswith(marker, start))
        self._give_text(start + len(marker))
        self._step = self._in_text

    def _give_text(self, num_chars: int) -> None:
        self._text.append(self._buffer[:num_chars])
        self._drop(num_chars)

    def _drop(self, num_chars: int) -> None:
        self._buffer = self._buffer[num_chars:]

    def _open_call(self, name: str) -> None:
        index = self._num_calls
        self._num_calls += 1
        self._deltas[index] = ToolCallDelta(index, self._new_id(), name, "")

    def _add_arguments(self, piece: str) -> None:
        if piece:
            index = self._num_calls - 1
            delta = self._deltas.get(index, ToolCallDelta(index, None, None, ""))
            self._deltas[index] = ToolCallDelta(index, delta.id, delta.name, delta.arguments + piece)


def _read_call(source: str) -> tuple[str, str] | None:
    """Return the name and the arguments of a call that is one JSON object; None if the object isn't a call."""
    try:
        call = json.loads(source)
    except (ValueError, RecursionError):
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if isinstance(arguments, str):  # JSON in a string, as in OpenAI's messages
        is_call = is_name(arguments)
    else:
        is_call = arguments is None or isinstance(arguments, dict)
        # Keep the model's escapes: they may be lone surrogates.
        arguments = json.dumps(arguments or {}, ensure_ascii="\\u" in source)
    return (name, arguments) if is_call and is_name(name) else None
