"""Errors of the text code, and the decoding of a client's bytes.

ValueError
├── TextError           the client's input is invalid; the message says why and what to do
└── TokenizerLoadError  a file of the tokenizer is missing or damaged; the message names it
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Error = TypeVar("Error", bound=BaseException)


class TextError(ValueError):
    """The client's text or messages can't be tokenized."""


class TokenizerLoadError(ValueError):
    """A file of the tokenizer is missing, damaged or inconsistent with another."""


def utf8_text(value: str | bytes, field: str) -> str:
    """Return `value` as str; `field` names it in the error.

    Raises:
        TextError: the bytes are not UTF-8.
    """
    try:
        return value if isinstance(value, str) else value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{field} is not UTF-8 (byte {error.start}): encode it as UTF-8") from error


def check_size(values: str | bytes | Iterable[bytes], field: str, max_bytes: int) -> None:
    """Check that a text, or several together, has at most `max_bytes` bytes; `field` names it in the error.

    Raises:
        TextError: it is longer.
    """
    size = len(values) if isinstance(values, str | bytes) else sum(map(len, values))
    if size > max_bytes:
        raise TextError(f"{field} has {size} bytes, must have at most {max_bytes}")


def one_line(error: Exception) -> str:
    """Return an exception's message without line breaks; its type's name if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def without_frames(error: Error) -> Error:
    """Return the error, its own and its causes' tracebacks removed; for one that is kept in a variable.

    A traceback's frames hold all variables of all callers, so an error in one of these makes a cycle: what the client
    has sent would stay in memory until the garbage collector looks at old objects, many requests later.
    """
    found: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and one not in found:
            found.append(one.with_traceback(None))
            todo += (one.__cause__, one.__context__)
    return error
