"""A call that was demanded: the model's text is JSON by its schema, which becomes a tool call as it streams."""

from __future__ import annotations

import json
import re
import secrets

from deepseek_triton.clients import ToolCall
from deepseek_triton.gateway.apis.openai_chat.tools import Function

# Of an object of `translate.call_schema`: everything before the arguments, and the name in it.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*', re.DOTALL)


class ForcedCall:
    """Reads one sequence's text. functions: those that may be called; of a single one the text is its arguments."""

    def __init__(self, functions: tuple[Function, ...]) -> None:
        self._name = functions[0].name if len(functions) == 1 else None
        self._is_wrapped = len(functions) > 1
        self._held = ""  # text that isn't told yet
        self._is_begun = False

    def push(self, text: str, *, is_last: bool = False) -> tuple[ToolCall, ...]:
        """The deltas that `text` adds; `is_last`: nothing follows."""
        self._held += text
        if self._name is None:
            head = _HEAD.match(self._held)
            if head is None:
                return ()
            self._name = json.loads(head[1])
            self._held = self._held[head.end() :]
        if not self._is_begun:
            self._held = self._held.lstrip()
        arguments = self._take(is_last)
        if not arguments:
            return ()
        if self._is_begun:
            return (ToolCall(0, None, None, arguments),)
        self._is_begun = True
        return (ToolCall(0, f"call_{secrets.token_hex(12)}", self._name, arguments),)

    def _take(self, is_last: bool) -> str:
        """The arguments' next characters. Of an object around them, the closing brace is the last one."""
        if not self._is_wrapped:
            taken, self._held = self._held, ""
            return taken
        kept = len(self._held.rstrip())
        if self._held[:kept].endswith("}"):
            kept = len(self._held[: kept - 1].rstrip())
        if is_last and not self._held.rstrip().endswith("}"):  # the answer was cut off by its length
            kept = len(self._held)
        taken, self._held = self._held[:kept], self._held[kept:]
        return taken
