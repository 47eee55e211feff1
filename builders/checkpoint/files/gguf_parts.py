"""The files of a GGUF: one, or the parts that llama.cpp's gguf-split makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.files.missing import FETCH_AGAIN, reason_missing
from deepseek_triton.builders.errors import CheckpointError

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# Beside a model in its directory: a vision encoder, and statistics for quantising.
NO_MODELS = re.compile(r"mmproj.*|.*imatrix\.gguf", re.IGNORECASE)


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The files of the model that `path` is or holds: all parts in order, whichever part is given.

    Raises:
        CheckpointError: a part is missing, or the directory holds several models.
    """
    if path.is_dir():
        path = _only_model(path)
    match = PART.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, _, count = match.groups()
    parts = tuple(path.with_name(f"{stem}-{number + 1:05}-of-{count}.gguf") for number in range(int(count)))
    missing = [part for part in parts if not part.exists()]
    if path not in parts:
        raise CheckpointError(f"{path} is by its name no part of {int(count)}: the first is NAME-00001-of-{count}.gguf")
    if missing:
        names = ", ".join(part.name for part in missing[:8])
        raise CheckpointError(f"{reason_missing(missing[0])} ({len(missing)} of {int(count)} parts missing: {names})")
    return parts


def _only_model(directory: Path) -> Path:
    first: dict[str, Path] = {}
    for file in sorted(directory.glob("*.gguf")):
        if not NO_MODELS.fullmatch(file.name):
            match = PART.fullmatch(file.name)
            first.setdefault(file.name if match is None else f"{match[1]} of {match[3]}", file)
    if len(first) != 1:
        names = ", ".join(file.name for file in first.values()) or "none"
        raise CheckpointError(f"{directory} holds {len(first)} GGUF models, give one of them by its file: {names}")
    return next(iter(first.values()))


def check_parts(files: Sequence[Path], metadata: Sequence[Mapping[str, Any]], num_tensors: int) -> None:
    """Do the parts say that they are parts of one file, each its place in it?

    Args:
        metadata: of each file.
        num_tensors: in all files together.

    Raises:
        CheckpointError: names the part that doesn't belong here.
    """
    for number, (file, values) in enumerate(zip(files, metadata, strict=True)):
        count = values.get("split.count") or 1
        if count != len(files):
            what = f"part {values.get('split.no', 0) + 1} of {count} of a GGUF file" if count != 1 else "a whole GGUF"
            raise CheckpointError(
                f"{file} is {what}, its name says otherwise: name it and the other parts NAME-00001-of-{count:05}.gguf"
            )
        if values.get("split.no", 0) != number:
            raise CheckpointError(f"{file} is part {values['split.no'] + 1}, its name says part {number + 1}")
    expected = metadata[0].get("split.tensors.count")
    if expected is not None and expected != num_tensors:
        raise CheckpointError(
            f"{files[0]}: the parts have {num_tensors} tensors, {expected} are needed: not of one file; {FETCH_AGAIN}"
        )
