"""Temporary directories that carry their owner's process id, and their removal once a killed owner has left them.

It knows names and process ids, not what the directories hold. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def make_directory(prefix: str) -> Path:
    """A new directory of this process; first, those of its kind whose processes have gone are removed."""
    _sweep(Path(tempfile.gettempdir()), prefix)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))


def remove_directory(directory: Path) -> None:
    """Remove it and the shared memory that is named after it."""
    for region in SHARED_MEMORY.glob(f"{directory.name}-*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """A directory for as long as it is needed."""
    directory = make_directory(prefix)
    try:
        yield directory
    finally:
        remove_directory(directory)


def _sweep(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*-*"):
        owner = path.name.removeprefix(prefix).partition("-")[0]
        with contextlib.suppress(OSError):  # another process may sweep too
            if owner.isdecimal() and not Path(f"/proc/{owner}").exists() and path.stat().st_uid == os.getuid():
                remove_directory(path)
