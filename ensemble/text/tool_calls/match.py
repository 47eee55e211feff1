"""Does a text begin with these steps? Of a text that is still coming, the answer may be: not known yet.

What enters: steps (spellings and runs of characters) and a text. What leaves: where they end and the name they
hold. It knows nothing of tools or formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

MAX_NAME_LEN: Final = 256  # OpenAI allows 64; what is longer is no name, and is not held back for ever


@dataclass(frozen=True)
class Maybe:
    """A spelling that may be left out."""

    literal: str


@dataclass(frozen=True)
class TextRun:
    """As many characters as `pattern` takes, also none; the pattern must match every beginning of its matches."""

    pattern: re.Pattern[str]


@dataclass(frozen=True)
class Name(TextRun):
    """A run that `read` makes the call's name of; None, and the text is no call."""

    read: Callable[[str], str | None]


MatchStep = str | Maybe | TextRun


@dataclass(frozen=True)
class Match:
    """The steps' text ends at `end`; `name` is what its `Name` read."""

    end: int
    name: str


class NoMatch(Enum):
    """Why there is none."""

    NEVER = "whatever follows"
    UNKNOWN = "the text ends too early to say"


def is_name(value: object) -> bool:
    """Can a tool be called so? JSON may escape half a surrogate pair, which no response could carry."""
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
    """Follow `steps` through `text` from `start`; with `final` nothing comes after `text`.

    An answer other than UNKNOWN stays the same whatever is appended to a text that isn't final.
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
