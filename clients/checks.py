"""What a value must be to be sent: checks that need no model.

Each raises `ValueError` with the field's name and its value.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_INT32 = 2**31 - 1
MAX_UINT64 = 2**64 - 1
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True)
class Range:
    """The numbers `low` … `high`, without `low` where it is excluded; whole ones alone where both ends are whole."""

    low: float
    high: float
    excludes_low: bool = False

    def check(self, name: str, value: Any) -> None:
        """Refuse anything but a number of this range; NaN is in none."""
        kinds = (int,) if self._is_whole else (int, float)
        # bool is an int to Python, and no number to us.
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high or (self.excludes_low and value == self.low):
            raise ValueError(f"{name} must be {self._rule}, got {value!r}")

    @property
    def _is_whole(self) -> bool:
        return isinstance(self.high, int)

    @property
    def _rule(self) -> str:
        if self._is_whole:
            return f"an integer from {self.low} to {self.high}"
        if self.excludes_low:
            return f"a finite number above {self.low:g} and at most {self.high:.6g}"
        return f"a finite number from {self.low:.6g} to {self.high:.6g}"


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_text(name: str, text: Any) -> None:
    """Refuse what can't travel as UTF-8, such as the lone surrogates of `sys.argv`."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 can encode, got {text[error.start]!r} at character {error.start}"
        ) from None


def text_tuple(name: str, texts: Any) -> tuple[str, ...]:
    """The texts, none of them empty, so that nobody changes them afterwards."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):  # a text is a sequence of texts to Python
        raise ValueError(f"{name} must be a list of texts, got {texts!r}")
    for text in texts:
        if text == "":
            raise ValueError(f"{name} must hold no empty text, got {texts!r}")
        check_text(name, text)
    return tuple(texts)


def json_text(name: str, value: Any) -> str:
    """The JSON of `value`."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be what JSON can tell ({error}), got {value!r}") from None
    check_text(name, text)
    return text


def json_copy(name: str, value: Any) -> Any:
    """A copy of `value`, so that nobody changes it afterwards."""
    return json.loads(json_text(name, value))
