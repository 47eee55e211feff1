"""The hidden directory beside a repository in which one model is built, and what killed builds left of theirs.

A build holds a lock on its directory while it lives, which the kernel frees when the process ends, however it ends. So
a directory whose lock can be taken belongs to nobody. This module doesn't know what the directories hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from deepseek_triton.builders.errors import BuildError

RANDOM = "[a-z0-9_]{8}"  # what mkdtemp appends


@contextlib.contextmanager
def staging_directory(repository: Path, name: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Make the directory in which model `name` is built, after `settle_leftovers`; it is removed at the end.

    Raises:
        BuildError: the same model is being built by another process, or the disk is at fault.
    """
    settle_leftovers(repository, name, say)
    staging, lock = _make(repository, name)
    try:
        yield staging
    except OSError as error:
        is_staged = error.filename is None or Path(error.filename).is_relative_to(staging)
        where = repository if is_staged else error.filename
        raise BuildError(
            f"{where}: {error.strerror}; the repository is unchanged: correct this and build again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def settle_leftovers(repository: Path, name: str, say: Callable[[str], None]) -> None:
    """Remove what killed builds of model `name` left, and say how many bytes that frees.

    This is the one place that decides what becomes of a leftover: a build that can go on from one takes it here.

    Raises:
        BuildError: another process builds the model now.
    """
    for leftover in _directories(repository, name):
        lock = _lock(leftover)
        if lock is None:
            raise BuildError(f"{name} is being built by another process, in {leftover}; wait for it, or end it")
        num_bytes = size_of(leftover)
        shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)
        say(f"removed what a killed build of {name} left: {leftover}, {num_bytes:,} bytes")


def size_of(directory: Path) -> int:
    """The bytes of all files below the directory."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_dir())


def _directories(repository: Path, name: str) -> list[Path]:
    pattern = re.compile(re.escape(_prefix(repository, name)) + RANDOM)
    # Beside the repository, not inside it: a running server would take it for a model.
    return [path for path in repository.resolve().parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]


def _prefix(repository: Path, name: str) -> str:
    return f".{repository.resolve().name}-building-{name}~"  # no name has a ~: no prefix is another's beginning


def _make(repository: Path, name: str) -> tuple[Path, int]:
    """A new directory and its lock; one that another build took for a leftover before it was locked is made again."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=_prefix(repository, name), dir=repository.resolve().parent))
        lock = _lock(staging, waits=True)
        if lock is not None and staging.exists():
            return staging, lock
        if lock is not None:
            os.close(lock)


def _lock(directory: Path, *, waits: bool = False) -> int | None:
    """Take the directory's lock; None if another process has it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except OSError:  # another process has it, or the file system has no locks
        if waits:
            return descriptor
        os.close(descriptor)
        return None
    return descriptor
