"""Values of a checkpoint's configuration, checked one by one: present, of the right type, in range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.errors import SpecError

MAX_WHOLE = 2**31 - 1
MAX_NUMBER = 1e30  # float32 arithmetic on anything larger would overflow


@contextmanager
def checked_spec() -> Iterator[None]:
    """A dimension that a decoder can't have is the checkpoint's fault."""
    try:
        yield
    except SpecError as error:
        raise CheckpointError(str(error)) from error


def supported(architecture: object) -> str:
    """The name of an architecture that is in the table."""
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return architecture


def whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; without a default it must be there (null is as good as absent)."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{key} is missing from the checkpoint's configuration; fetch the checkpoint again")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{key} is {value!r}, must be a positive whole number")
    if value > MAX_WHOLE:
        raise CheckpointError(f"{key} is {value}, must be at most {MAX_WHOLE}")
    return value


def number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number; without a default it must be there (null is as good as absent)."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{key} is missing from the checkpoint's configuration; fetch the checkpoint again")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MAX_NUMBER:
        raise CheckpointError(f"{key} is {value!r}, must be a number")
    return float(value)


def token_ids(values: list[Any]) -> tuple[int, ...]:
    """Each id once, in order; None is none."""
    for value in values:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CheckpointError(f"eos_token_id is {value!r}, must be a token id")
    return tuple(dict.fromkeys(value for value in values if value is not None))
