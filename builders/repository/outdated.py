"""Models that an earlier version of this project built: its manifest has another format, its model.py other imports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from deepseek_triton.builders.repository.wiring import Problem
from deepseek_triton.ensemble.artefacts.manifest import FILE_NAME as MANIFEST
from deepseek_triton.ensemble.artefacts.manifest import Manifest, ManifestError, OutdatedError, current_command
from deepseek_triton.ensemble.protocol.pipelines import (
    ENGINE_SUFFIX,
    PART_SUFFIXES,
    model_name,
)

OLD_IMPORT = re.compile(r"^from ensemble\.", re.MULTILINE)  # now deepseek_triton.ensemble


def outdated_models(repository: Path) -> Iterator[tuple[Problem, frozenset[str]]]:
    """Each outdated served model: one line with the command that rebuilds it, and the names of its parts.

    Their other problems follow from that one.
    """
    suffix = f"-{ENGINE_SUFFIX}"
    for engine in sorted(repository.glob(f"*{suffix}")):
        served_name = engine.name.removesuffix(suffix)
        parts = [served_name, *(model_name(served_name, part) for part in PART_SUFFIXES)]
        versions = sorted((path for path in engine.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
        if versions and (problem := _problem(repository, parts, versions[-1])):
            yield problem, frozenset(parts)


def _problem(repository: Path, parts: list[str], newest: Path) -> Problem | None:
    manifest = newest / MANIFEST
    try:
        Manifest.load(newest)
    except OutdatedError as error:
        return Problem(str(manifest), str(error).removeprefix(str(manifest)).lstrip(": "))
    except ManifestError:
        return None
    for part in parts:
        path = repository / part / newest.name / "model.py"
        if path.is_file() and OLD_IMPORT.search(path.read_text(encoding="utf-8", errors="replace")):
            command = current_command(json.loads(manifest.read_text(encoding="utf-8"))["command"])
            return Problem(str(path), f"was written by an earlier version; rebuild with: {command}")
    return None
