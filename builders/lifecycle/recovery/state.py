"""What a killed recovery goes on from: one file that is replaced as a whole, in a directory beside the output.

A process holds a lock on the directory while it trains, which the kernel frees when it ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError

FINGERPRINT, STATE, BEST = "fingerprint.json", "state.pt", "best.pt"


class TrainingState:
    """The directory; `fingerprint` is all that the result depends on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def load(self, name: str = STATE) -> dict[str, Any] | None:
        """The last state that was saved whole; None: there is none.

        Raises:
            BuildError: the file is damaged.
        """
        import pickle

        import torch

        path = self.directory / name
        if not path.exists():
            return None
        try:
            values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise BuildError(f"{path} is damaged; begin anew with --restart") from error
        return values

    def save(self, values: Mapping[str, Any], name: str = STATE) -> None:
        """Replace the state.

        Raises:
            BuildError: the disk is full, or can't be written.
        """
        import torch

        path, temporary = self.directory / name, self.directory / f".{name}"
        try:
            with temporary.open("wb") as stream:
                torch.save(dict(values), stream)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch tells a full disk by a RuntimeError
            raise BuildError(f"{path}: {error}; make room and run the same command again, it goes on") from error

    def discard(self) -> None:
        """Remove it: the output is there."""
        shutil.rmtree(self.directory, ignore_errors=True)


def state_directory(output: Path) -> Path:
    """The hidden directory beside `output`."""
    resolved = output.resolve()
    return resolved.parent / f".{resolved.name}-recovering"


def what_stays(output: Path) -> str:
    """What an interrupted run leaves, and how to go on."""
    if not (directory := state_directory(output)).exists():
        return "nothing was written"
    return f"{directory} holds the last state; the same command goes on from it"


@contextlib.contextmanager
def training_state(output: Path, fingerprint: Mapping[str, Any], *, restarts: bool) -> Iterator[TrainingState]:
    """Open what an earlier run of the same fingerprint left, or begin.

    Raises:
        BuildError: another process trains it, or what lies there belongs to a run with other settings or texts.
    """
    directory = state_directory(output)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BuildError(f"{directory}: {error.strerror}; give another --output") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"{output} is being recovered by another process; wait for it, or end it") from error
        if restarts:
            for file in directory.iterdir():
                file.unlink()
        _check(directory, output, fingerprint)
        yield TrainingState(directory)
    finally:
        os.close(lock)


def _check(directory: Path, output: Path, fingerprint: Mapping[str, Any]) -> None:
    path = directory / FINGERPRINT
    wanted = json.loads(json.dumps(fingerprint))
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        found = {}
    if found is None:
        temporary = directory / f".{FINGERPRINT}"
        temporary.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        temporary.replace(path)
    elif found != wanted:
        differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        raise BuildError(
            f"an earlier recovery of {output} had another {', '.join(differing)}; run it as it was, or begin anew with "
            "--restart"
        )
