"""Errors of the text code, and the decoding of a client's bytes.

ValueError
├── TextError           the client's input is invalid; the message says why and what to do
└── TokenizerLoadError  a file of the tokenizer is missing or damaged; the message names it
"""

from __future__ import annotations


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


def one_line(error: Exception) -> str:
    """Return an exception's message without line breaks; its type's name if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
