"""Is a checkpoint what its configuration says: its tensors, its JSON files."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.files.missing import FETCH_AGAIN, open_file
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.spec import ModelSpec


@contextlib.contextmanager
def naming_file(file: Path) -> Iterator[None]:
    """Put the file at fault before a message that doesn't name it."""
    try:
        yield
    except (CheckpointError, UnsupportedError) as error:
        if str(file.parent) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error


def check_tensors(spec: ModelSpec, found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Every tensor of `spec` is in `found`, name → shape, and no other.

    Raises:
        CheckpointError: names the first that is missing, unknown or mis-shaped.
    """
    expected = spec.tensor_shapes()
    # A tied head may be stored all the same.
    tied = {"lm_head.weight"} if spec.tie_word_embeddings else set()
    problems: list[tuple[str, Callable[[str], str]]] = []
    unknown = [name for name in found if name not in expected and name not in tied]
    beside = f", and {unknown[0]!r} is there, which no {spec.architecture} model has" if unknown else ""
    problems += [(name, lambda n: f"{n} is missing{beside}") for name in expected if name not in found]
    problems += [
        (name, lambda n: f"{n!r} is not part of a {spec.architecture} model with this configuration")
        for name in unknown
    ]
    problems += [
        (name, lambda n: f"{n} has shape {list(found[n])}, expected {list(expected[n])}")
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        name, describe = problems[0]
        more = f" (and {len(problems) - 1} more tensors)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path}: {describe(name)}{more}; weights and configuration don't belong together")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        CheckpointError: the file is missing or holds no JSON object.
    """
    try:
        with open_file(file) as stream:
            value = json.loads(stream.read().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; {FETCH_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); correct it, or fetch this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object; {FETCH_AGAIN}")
    return value
