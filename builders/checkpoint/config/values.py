"""Values of a checkpoint's configuration, checked one by one: present, of the right type, in range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.errors import SpecError

# Architectures of this family that nothing here computes, by their names in config.json and in GGUF → what they have.
NOT_YET = {
    "deepseek32": "an indexer, which is read of Hugging Face's checkpoints alone",
    **dict.fromkeys(
        ("deepseek_v4", "deepseek4"), "attention over compressed tokens, sinks, and hyper-connections of four streams"
    ),
    "kimi_k2": "DeepSeek-V3's layers with other numbers",
    **dict.fromkeys(("deepseek", "qwen2_moe", "qwen3_moe", "qwen2moe", "qwen3moe"), "experts without latent attention"),
}
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
        if isinstance(architecture, str) and architecture in NOT_YET:
            raise UnsupportedError(
                f"architecture {architecture!r} has {NOT_YET[architecture]}: not supported yet; supported: "
                f"{', '.join(sorted(ARCHITECTURES))}"
            )
        raise UnsupportedError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return architecture


def whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; without a default it must be there (null is as good as absent)."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{key} is missing from the checkpoint's configuration")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{key} is {value!r}, must be a positive whole number")
    if value > MAX_WHOLE:
        raise CheckpointError(f"{key} is {value}, must be at most {MAX_WHOLE}")
    return value


def count(values: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number that may be 0 (null is as good as absent)."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_WHOLE:
        raise CheckpointError(f"{key} is {value!r}, must be a whole number of at least 0")
    return value


def number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number; without a default it must be there (null is as good as absent)."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{key} is missing from the checkpoint's configuration")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MAX_NUMBER:
        raise CheckpointError(f"{key} is {value!r}, must be a number")
    return float(value)


def flag(values: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """True or false; absent is the default, and null is false."""
    value = values.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{key} is {value!r}, must be true or false")
    return bool(value)


def token_ids(values: list[Any], key: str = "eos_token_id", vocab_size: int | None = None) -> tuple[int, ...]:
    """Each id once, in order; None is none. key: for the message. vocab_size: where ids are below it; None: unknown."""
    for value in values:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CheckpointError(f"{key} is {value!r}, must be a token id")
        if value is not None and vocab_size is not None and not 0 <= value < vocab_size:
            raise CheckpointError(f"{key} is {value}, outside the vocabulary of {vocab_size}")
    return tuple(dict.fromkeys(value for value in values if value is not None))


def rope_factor(values: Mapping[str, Any]) -> float:
    """By how much GGUF metadata says that positions are stretched; 1: they aren't.

    Files of before August 2023 have rope.scale_linear.
    """
    return number(values, "rope.scaling.factor", number(values, "rope.scale_linear", 0.0)) or 1.0
