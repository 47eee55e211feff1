"""Temporary directories whose names hold their owner's process id, so that those of killed processes can be removed.

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
    """Remove the directories with this prefix whose processes have ended, and make one for this process."""
    _sweep(Path(tempfile.gettempdir()), prefix)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))


def remove_directory(directory: Path) -> None:
    """Remove a directory and the regions of shared memory that are named after it."""
    for region in SHARED_MEMORY.glob(f"{directory.name}-*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """A context manager: the directory exists inside it."""
    directory = make_directory(prefix)
    try:
        yield directory
    finally:
        remove_directory(directory)


def _sweep(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*-*"):
        owner = path.name.removeprefix(prefix).partition("-")[0]
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            if owner.isdecimal() and not Path(f"/proc/{owner}").exists() and path.stat().st_uid == os.getuid():
                remove_directory(path)
