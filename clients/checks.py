"""Checks of a request's values that need no model.

Each raises `ValueError` with the field's name and its value.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deepseek_triton.ensemble.protocol.ranges import Range


def check_number(name: str, allowed: Range, value: Any) -> None:
    """Refuse anything but a number of the range `allowed`; NaN is in none."""
    kinds, kind = ((int,), "an integer") if allowed.is_whole else ((int, float), "a number")
    if not isinstance(value, kinds) or isinstance(value, bool):  # bool is an int to Python
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    if not allowed.holds(value):
        raise ValueError(f"{name} must be {allowed.broken_rule(value)}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Refuse anything but True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_text(name: str, text: Any) -> None:
    """Refuse text that UTF-8 can't encode, such as the lone surrogates of `sys.argv`."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 can encode, got {text[error.start]!r} at character {error.start}"
        ) from None


def text_tuple(name: str, texts: Any) -> tuple[str, ...]:
    """A copy of `texts`, none of which may be empty; a tuple, so that nobody changes it afterwards."""
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
        raise ValueError(f"{name} must be what JSON can represent ({error}), got {value!r}") from None
    check_text(name, text)
    return text


def json_copy(name: str, value: Any) -> Any:
    """A copy of `value`, so that nobody changes it afterwards."""
    return json.loads(json_text(name, value))
