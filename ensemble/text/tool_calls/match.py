"""Matches a sequence of literals and patterns against streamed text.

Of a text that is incomplete the result may be UNKNOWN: more text is needed. This module knows nothing of tools or
their formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

MAX_NAME_LEN: Final = 256  # in characters; OpenAI allows 64. The limit bounds how much text is held back.


@dataclass(frozen=True)
class Maybe:
    """An optional literal."""

    literal: str


@dataclass(frozen=True)
class TextRun:
    """The longest match of `pattern`, which may be empty. The pattern must also match every prefix of its matches."""

    pattern: re.Pattern[str]


@dataclass(frozen=True)
class Name(TextRun):
    """A run that holds the call's name. `read` returns the name, or None if the run isn't a valid one."""

    read: Callable[[str], str | None]


MatchStep = str | Maybe | TextRun


@dataclass(frozen=True)
class Match:
    """The matched text ends at index `end`; `name` is the value of its `Name` step."""

    end: int
    name: str


class NoMatch(Enum):
    """Why there is no match."""

    NEVER = "no continuation of the text matches"
    UNKNOWN = "the text may match when more of it has arrived"


def is_name(value: object) -> bool:
    """Return whether `value` can be a tool's name: a string, not empty, without lone surrogates (invalid in UTF-8)."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= symbol <= "\udfff" for symbol in value)


def _json_string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if is_name(value) else None


SPACE = TextRun(re.compile(r"\s{0,64}"))
NAME = Name(re.compile(rf"[^\s<>{{}}\[\]\"`,]{{0,{MAX_NAME_LEN}}}"), lambda text: text or None)
JSON_NAME = Name(re.compile(rf'"(?:[^"\\\n]|\\.?){{0,{MAX_NAME_LEN}}}"?'), _json_string)


def match(steps: Sequence[MatchStep], text: str, start: int, final: bool) -> Match | NoMatch:
    """Match `steps` against `text` from index `start`; `final` says that the text is complete.

    A result other than UNKNOWN doesn't change when text is appended.
    """
    position, name = start, ""
    for step in steps:
        if isinstance(step, TextRun):
            found = step.pattern.match(text, position)
            end = found.end() if found else position
            if end == len(text) and not final:
                return NoMatch.UNKNOWN
            if isinstance(step, Name):
                read = step.read(text[position:end])
                if read is None:
                    return NoMatch.NEVER
                name = read
            position = end
            continue
        literal = step.literal if isinstance(step, Maybe) else step
        if text.startswith(literal, position):
            position += len(literal)
        elif not final and literal.startswith(text[position:]):
            return NoMatch.UNKNOWN
        elif not isinstance(step, Maybe):
            return NoMatch.NEVER
    return Match(position, name)
