"""What a killed build had finished, in a directory beside the repository; the next build of the model goes on there.

A section holds the results of one phase. Its name has a digest of everything that they depend on; a section with
another digest is removed, so that nothing is taken from a build of something else. Files are written whole or not at
all. Without a directory nothing is kept.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.processes.machine import num_cores

Arrays = Mapping[str, NDArray[Any]]
FORMAT = 1


class Section:
    """Named sets of arrays; directory: None keeps nothing."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """What was saved as `name`, or None."""
        if self._directory is None:
            return None
        try:
            with (self._directory / f"{name}.npz").open("rb") as stream, np.load(stream) as file:
                return dict(file)
        except (OSError, ValueError, zipfile.BadZipFile, KeyError, EOFError):  # missing, or the machine lost its power
            return None

    def save(self, name: str, arrays: Arrays) -> None:
        """Keep `arrays`; what was saved under this name before is replaced."""
        if self._directory is None:
            return
        temporary = self._directory / f".{name}.npz"
        with temporary.open("wb") as stream:
            np.savez(stream, **dict(arrays))
        temporary.replace(self._directory / f"{name}.npz")

    def load_windows(self, name: str) -> tuple[list[NDArray[Any]], NDArray[Any]] | None:
        """What `save_windows` saved, and its `extra`, or None."""
        found = self.load(name)
        if found is None:
            return None
        return np.split(found["rows"], np.cumsum(found["lengths"])[:-1]), found["extra"]

    def save_windows(self, name: str, windows: Sequence[NDArray[Any]], extra: NDArray[Any]) -> None:
        """Keep arrays [seq_len, …] that differ in seq_len alone."""
        lengths = np.array([len(window) for window in windows])
        self.save(name, {"rows": np.concatenate(windows), "lengths": lengths, "extra": extra})


class BuildJournal:
    """The sections of one build.

    directory: where they are kept; None: nowhere. subject: what all of them depend on, as plain values.
    """

    def __init__(self, directory: Path | None = None, subject: Mapping[str, Any] | None = None) -> None:
        self._directory, self._subject = directory, dict(subject or {})

    def section(self, phase: str, **inputs: Any) -> Section:
        """The results of `phase` where they depend on `inputs`, plain values."""
        if self._directory is None:
            return Section()
        told = json.dumps({"format": FORMAT, **self._subject, **inputs}, sort_keys=True, default=str)
        path = self._directory / f"{phase}-{sha256(told.encode()).hexdigest()[:16]}"
        for other in self._directory.glob(f"{phase}-*"):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        return Section(path)

    def discard(self) -> None:
        """Remove everything: the build has ended."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def journal_directory(repository: Path, name: str) -> Path:
    """Where the journal of a build of model `name` is: beside the repository, which a server reads."""
    return repository.resolve().parent / f".{repository.resolve().name}-unfinished-{name}"


def subject_of(checkpoint: Path, device: str) -> dict[str, Any]:
    """What every phase depends on: the checkpoint's files, and what decides the last bits of a sum."""
    files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"files": states, "device": device, "cores": num_cores(), "numpy": np.__version__}
