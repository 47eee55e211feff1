"""Bytes → JSON value, or one sentence that says what is wrong. Nothing here recurses deeper than the bound allows.

What is refused beside wrong syntax: a key that one object has twice, NaN and infinities, integers beyond 64 bits,
halves of surrogate pairs, bytes that aren't UTF-8, and more nesting or values than the bounds. Parsers differ in what
they make of these, and some die of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What counts, once escapes are gone: strings (one that nothing ends goes to the end), brackets and commas.
TOKEN = re.compile(rb'"[^"]*(?:"|\Z)|[\[\]{},]')
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
INTEGERS = range(-(2**63), 2**64)
MAX_DIGITS = 20  # of an integer in that range, its sign included


class JsonError(ValueError):
    """A body that isn't what it should be; the text is for the client."""


class JsonTooLargeError(JsonError):
    """A body that exceeds a bound."""


@dataclass(frozen=True)
class JsonBounds:
    """max_depth: of arrays and objects in each other. max_members: values, in all arrays and objects."""

    max_depth: int
    max_members: int


def parse(body: bytes, bounds: JsonBounds) -> Any:
    """Read a whole body. Raises `JsonError`."""
    check_shape(body, bounds)
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except UnicodeDecodeError as error:
        raise JsonError(f"the body must be UTF-8: the byte at {error.start} is wrong") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"the body must be JSON: {error}") from None
    except RecursionError:
        raise JsonTooLargeError("the body is nested too deep") from None
    if SURROGATE.search(body):
        for text in texts(value):
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise JsonError("the body has half of a surrogate pair in a string")
    return value


def check_shape(body: bytes, bounds: JsonBounds) -> None:
    """Measure nesting and values without parsing. Raises `JsonTooLargeError`; the time is bounded by the bounds."""
    num_openings = body.count(b"[") + body.count(b"{")
    if num_openings <= bounds.max_depth and num_openings + body.count(b",") <= bounds.max_members:
        return  # most bodies
    # Without escapes a string ends at the next quote. Where this reads wrong JSON otherwise than a parser does,
    # the parser stops before that place.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    depth = num_members = num_others = 0
    for match in TOKEN.finditer(plain):
        token = match[0]
        if token in (b"[", b"{"):
            depth += 1
            num_members += 1
            if depth > bounds.max_depth:
                raise JsonTooLargeError(f"the body is nested deeper than {bounds.max_depth} levels")
        elif token in (b"]", b"}"):
            depth -= 1
            num_others += 1  # so that rows of closing brackets end, too
        elif token == b",":
            num_members += 1
        else:
            num_others += 1  # strings: names and values
        if num_members > bounds.max_members or num_others > 3 * bounds.max_members:
            raise JsonTooLargeError(f"the body has more than {bounds.max_members} values")


def texts(value: Any) -> Iterator[str]:
    """All strings in a JSON value, names of members among them."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise JsonError(f"the body has {_shown(name)} twice in one object")
            seen.add(name)
    return value


def _refuse_constant(text: str) -> Any:
    raise JsonError(f"the body must be JSON, which has no {text}")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS or (value := int(text)) not in INTEGERS:
        raise JsonError(f"the body has an integer beyond 64 bits: {_shown(text)}")
    return value


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise JsonError(f"the body has a number beyond the range of double precision: {_shown(text)}")
    return value


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 40 else f"{text[:40]}…")
