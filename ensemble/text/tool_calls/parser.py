"""A model's text, as it comes, to text and tool calls.

What enters: text, cut anywhere, and the format that the model was taught. What leaves: the text outside of calls,
and the calls in pieces as OpenAI streams them. It knows nothing of tokens, of reasoning or of which tools there are.

What a call is: from its name and the `{` of its arguments on, it is one. Up to there whatever doesn't fit comes out
as the text that it was, markers included. From there on nothing is taken back: the arguments are the model's
own characters to the object's end, or, where it never closes, to the call's end marker or the end of the text. White
space between and after calls belongs to their frame and is dropped. Nothing raises; no other text is lost.
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
    """What one piece of text added to a call. `id` and `name` come once, with the first."""

    index: int  # of the call among the sequence's
    id: str | None
    name: str | None
    arguments: str  # the next characters of the arguments' JSON

    def as_openai(self) -> dict[str, Any]:
        """An element of `delta.tool_calls` in OpenAI's stream; of a whole answer, of `message.tool_calls`."""
        function = (
            {"arguments": self.arguments} if self.name is None else {"name": self.name, "arguments": self.arguments}
        )
        head = {} if self.id is None else {"id": self.id, "type": "function"}
        return {"index": self.index, **head, "function": function}


def random_id() -> str:
    """An id that no other call has: clients send it back, perhaps among those of many requests."""
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolCallParser:
    """One sequence's text to text and calls. Joined, neither depends on how the text was cut, ids aside."""

    def __init__(self, tool_format: ToolFormat, new_id: Callable[[], str] = random_id) -> None:
        self._format = tool_format
        self._new_id = new_id
        self._buffer = ""
        self._step: Callable[[bool], bool] = self._in_text
        self._scanner = ObjectScanner(())
        self._num_scanned = 0
        self._num_calls = 0
        self._text: list[str] = []  # of this push
        self._deltas: dict[int, ToolCallDelta] = {}
        self._is_final = False

    def push(self, text: str, final: bool = False) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """What `text` completes: text, and at most one delta for each call. Nothing may follow a final push."""
        if self._is_final:
            raise RuntimeError("push after the final push: make a new ToolCallParser for each sequence")
        self._is_final = final
        self._buffer += text
        while self._step(final):
            pass
        ready = "".join(self._text), tuple(self._deltas.values())
        self._text, self._deltas = [], {}
        return ready

    # Each step takes from the buffer what it can tell, and sets the next; False: it needs more text.

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
        """The buffer begins with a start marker, white space before it perhaps."""
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
        """Members in another order than the opening's: the call is known when its object ends."""
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
        """The buffer's start marker begins no call: it is text, and so may be what follows."""
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
    """Name and arguments of a call that is one JSON object; None where it isn't a call."""
    try:
        call = json.loads(source)
    except (ValueError, RecursionError):
        return None
    name, arguments = call.get("name"), call.get("arguments", {})
    if isinstance(arguments, str):  # JSON in a string, as OpenAI's own messages have it
        is_call = is_name(arguments)
    else:
        is_call = arguments is None or isinstance(arguments, dict)
        # What the model escaped stays escaped: it may be half a surrogate pair.
        arguments = json.dumps(arguments or {}, ensure_ascii="\\u" in source)
    return (name, arguments) if is_call and is_name(name) else None
