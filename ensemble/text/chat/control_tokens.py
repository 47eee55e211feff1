"""Keeps control tokens that a client wrote into its texts from becoming control tokens of the prompt.

A user who writes `<|im_end|>` could otherwise end its turn and write the next one in another's name. Each such token in
a client's text is broken by a mark; the tokenizer encodes the prompt piece by piece between the marks, so that nothing
but the template's own control tokens is one. This module knows spellings, not ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

# Noncharacters of Unicode, of which texts hold none; if one does, the next is taken.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_MIN_PREFIX_LEN = 2
_ASSISTANT_TEXTS = ("content", "reasoning_content")


@dataclass(frozen=True)
class Protected:
    """A template's variables; `mark` breaks the control tokens in them, None: there are none."""

    variables: Mapping[str, Any]
    mark: str | None = None


class ControlTokens:
    """The control tokens of one tokenizer.

    Args:
        spellings: of all of them.
        markers: those that an assistant's own text may hold, as `<think>`: a template looks for them there.
    """

    def __init__(self, spellings: Collection[str], markers: Collection[str] = ()) -> None:
        self._everywhere = _pattern(spellings)
        self._in_assistant = _pattern(set(spellings) - set(markers))

    def protect(self, variables: Mapping[str, Any]) -> Protected:
        """Break every control token in the client's variables: messages, tools and template options.

        So is the beginning of one at the end of a text, which the template might complete.
        """
        if not self._is_in(variables):
            return Protected(variables)
        mark = next(mark for mark in _MARKS if mark == _MARKS[-1] or not _holds(variables, mark))
        broken = _map(variables, lambda text, pattern: pattern.sub(lambda m: m[0][0] + mark + m[0][1:], text), self)
        return Protected(broken, mark)

    def pattern(self, is_assistant: bool) -> re.Pattern[str]:
        """What to break in a text; `is_assistant`: in the text of an assistant."""
        return self._in_assistant if is_assistant else self._everywhere

    def _is_in(self, variables: Mapping[str, Any]) -> bool:
        found: list[str] = []

        def look(text: str, pattern: re.Pattern[str]) -> str:
            if not found and pattern.search(text):
                found.append(text)
            return text

        _map(variables, look, self)
        return bool(found)


def unescape(prompt: str, mark: str) -> str:
    """Return `prompt` with the marks that the template's `tojson` has escaped as marks."""
    return re.sub(rf"\\u{ord(mark):04x}", mark, prompt, flags=re.IGNORECASE)


def _pattern(spellings: Collection[str]) -> re.Pattern[str]:
    whole = sorted((spelling for spelling in spellings if len(spelling) > 1), key=len, reverse=True)
    if not whole:
        return re.compile(r"(?!)")
    begun = {word[:length] for word in whole for length in range(_MIN_PREFIX_LEN, len(word))}
    words = "|".join(map(re.escape, whole))
    beginnings = "|".join(map(re.escape, sorted(begun, key=len, reverse=True)))
    return re.compile(rf"(?:{words})|(?:{beginnings})\Z" if begun else words)


def _map(value: Any, change: Callable[[str, re.Pattern[str]], str], tokens: ControlTokens) -> Any:
    """Return a copy of JSON values in which every text, keys too, went through `change(text, pattern)`.

    Without recursion: a client may nest values deeper than Python's stack reaches.
    """
    copied: list[Any] = [None]
    waiting: list[tuple[Any, bool, Any, Any]] = [(value, False, copied, 0)]  # value, is an assistant's text, its place
    while waiting:
        value, is_assistant, parent, place = waiting.pop()
        if isinstance(value, str):
            parent[place] = change(value, tokens.pattern(is_assistant))
        elif isinstance(value, list | tuple):
            parent[place] = items = [None] * len(value)
            waiting += ((item, False, items, index) for index, item in enumerate(value))
        elif isinstance(value, Mapping):
            entries: dict[Any, Any] = {}
            parent[place] = entries
            is_said = value.get("role") == "assistant"
            for key, item in value.items():
                name = change(key, tokens.pattern(False)) if isinstance(key, str) else key
                entries[name] = None  # in this order
                waiting.append((item, is_said and key in _ASSISTANT_TEXTS, entries, name))
        else:
            parent[place] = value
    return copied[0]


def _holds(value: Any, character: str) -> bool:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and character in value:
            return True
        if isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
    return False


NO_CONTROL_TOKENS = ControlTokens(())
