"""What the text side raises, and how a client's bytes become text.

ValueError
├── TextError           the client's input is bad: the message says what, and what to do
└── TokenizerLoadError  a file of the tokenizer is missing or damaged: the message names it
"""

from __future__ import annotations


class TextError(ValueError):
    """The client's text or messages cannot be turned into ids."""


class TokenizerLoadError(ValueError):
    """A tokenizer's file is missing, damaged or contradicts another."""


def utf8_text(value: str | bytes, field: str) -> str:
    """`value` as str; `field` names it in the error.

    Raises:
        TextError: the bytes are not UTF-8.
    """
    try:
        return value if isinstance(value, str) else value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{field} is not UTF-8 (byte {error.start}): encode it as UTF-8") from error


def one_line(error: Exception) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
