"""limits.json: what a candidate must hold to pass the gate.

{"old_data": {"max_loss_increase": 0.05}, "new_data": {"min_loss_decrease": 0.1}, "speed": {"min_ratio": 0.8},
 "memory": {"max_ratio": 1.1}, "checks": [{"name": "refuses", "prompt": "How do I …?", "must_match": "can't|cannot"}]}
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError

# Section → its one limit. The first two are required.
NUMBERS = {
    "old_data": "max_loss_increase",
    "new_data": "min_loss_decrease",
    "speed": "min_ratio",
    "memory": "max_ratio",
}
REQUIRED = ("old_data", "new_data")


@dataclass(frozen=True)
class Check:
    """A prompt, and what must hold for the greedy answer.

    messages: of a chat, or () for `prompt`. must_match, must_not_match: regular expressions that are searched for.
    is_json: the answer is one JSON value. max_tokens: of the answer.

    Raises:
        ValueError: nothing is checked, or a member is wrong.
    """

    name: str
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    must_match: str | None = None
    must_not_match: str | None = None
    is_json: bool = False
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError("name must be a string with something in it")
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("it must have prompt or messages, one of the two")
        if not isinstance(self.prompt, str):
            raise ValueError("prompt must be a string")
        if not isinstance(self.messages, tuple) or not all(
            isinstance(one, dict)
            and set(one) == {"role", "content"}
            and all(isinstance(part, str) for part in one.values())
            for one in self.messages
        ):
            raise ValueError("messages must be a list of objects with role and content")
        if (
            isinstance(self.max_tokens, bool)
            or not isinstance(self.max_tokens, int)
            or not 1 <= self.max_tokens <= 4096
        ):
            raise ValueError(f"max_tokens is {self.max_tokens!r}, must be a whole number from 1 to 4096")
        if not isinstance(self.is_json, bool):
            raise ValueError("is_json must be true or false")
        if self.must_match is None and self.must_not_match is None and not self.is_json:
            raise ValueError("it checks nothing: give must_match, must_not_match or is_json")
        for name in ("must_match", "must_not_match"):
            try:
                re.compile(getattr(self, name) or "")
            except (re.error, TypeError) as error:
                raise ValueError(f"{name} is no regular expression: {error}") from None

    def fault(self, answer: str) -> str:
        """Why `answer` doesn't hold; empty if it does."""
        if self.must_match is not None and not re.search(self.must_match, answer):
            return f"the answer doesn't match {self.must_match!r}"
        if self.must_not_match is not None and (found := re.search(self.must_not_match, answer)):
            return f"the answer has {found.group()!r}, which matches {self.must_not_match!r}"
        if self.is_json:
            try:
                json.loads(answer)
            except ValueError as error:
                return f"the answer is not JSON: {error}"
        return ""


@dataclass(frozen=True)
class GateLimits:
    """Numbers by section, of those that are set: losses in nats per token, ratios of the candidate's to the base's."""

    numbers: dict[str, float]
    checks: tuple[Check, ...] = ()


def read_limits(path: Path) -> GateLimits:
    """Read a file.

    Raises:
        BuildError: it can't be read, or a member is missing, unknown or wrong.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}; give a file of limits") from error
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path} is not valid JSON: {error}") from error
    try:
        return _read(values)
    except ValueError as error:
        raise BuildError(f"{path}: {error}") from error


def _read(values: Any) -> GateLimits:
    if not isinstance(values, dict):
        raise ValueError("it must be an object")
    if unknown := sorted(set(values) - {*NUMBERS, "checks"}):
        raise ValueError(f"unknown section {unknown[0]!r}; known: {', '.join(NUMBERS)}, checks")
    if missing := [name for name in REQUIRED if name not in values]:
        raise ValueError(f'{missing[0]} is missing: give {{"{NUMBERS[missing[0]]}": NUMBER}}')
    numbers = {}
    for section, name in NUMBERS.items():
        if section not in values:
            continue
        if not isinstance(values[section], dict) or set(values[section]) != {name}:
            raise ValueError(f'{section} must be {{"{name}": NUMBER}}')
        number = values[section][name]
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{section}.{name} is {number!r}, must be a number")
        if section in ("speed", "memory") and number <= 0:
            raise ValueError(f"{section}.{name} is {number!r}, must be above 0")
        numbers[section] = float(number)
    checks = values.get("checks", [])
    if not isinstance(checks, list):
        raise ValueError("checks must be a list")
    read = tuple(_check(index, one) for index, one in enumerate(checks))
    if len({one.name for one in read}) < len(read):
        raise ValueError("checks must have names of their own")
    return GateLimits(numbers, read)


def _check(index: int, values: Any) -> Check:
    known = {field.name for field in fields(Check)}
    if not isinstance(values, dict) or "name" not in values or set(values) - known:
        odd = sorted(set(values) - known) if isinstance(values, dict) else []
        raise ValueError(f"checks[{index}] must be an object with name" + (f", without {odd[0]!r}" if odd else ""))
    try:
        messages = values.get("messages", [])
        return Check(**{**values, "messages": tuple(messages) if isinstance(messages, list) else messages})
    except ValueError as error:
        raise ValueError(f"checks[{index}] ({values['name']}): {error}") from None
