"""Temporary directories whose names hold their owner's process id, so that those of killed processes can be removed.

It knows names and process ids, not what the directories hold. Linux only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deepseek_triton.ensemble.processes.stat import pid_namespace

SHARED_MEMORY = Path("/dev/shm")


def make_directory(prefix: str) -> Path:
    """Remove the directories with this prefix whose processes have ended, and make one for this process."""
    _sweep(Path(tempfile.gettempdir()), prefix)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-{pid_namespace()}-"))


def remove_directory(directory: Path) -> None:
    """Remove a directory and the regions of shared memory that are named after it."""
    for region in SHARED_MEMORY.glob(f"{directory.name}-*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def make_private(directory: Path) -> None:
    """Make `directory` for this user alone, or see that it is so: another user may have planted one in its place.

    Raises:
        PermissionError: it is a link or no directory, belongs to another user, or others may enter it.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = os.lstat(directory)
    wrong = {
        "is not a directory of its own": not stat.S_ISDIR(status.st_mode),
        "belongs to another user": status.st_uid != os.getuid(),
        "is open to other users": stat.S_IMODE(status.st_mode) & 0o077 != 0,
    }
    for reason in (reason for reason, holds in wrong.items() if holds):
        raise PermissionError(errno.EPERM, f"{reason}; remove it", str(directory))


def close_shared_memory(directory: Path) -> None:
    """Take from other users the right to read the regions of shared memory that are named after a directory.

    Triton makes them readable to all, whatever the umask is.
    """
    for region in SHARED_MEMORY.glob(f"{directory.name}-*"):
        with contextlib.suppress(FileNotFoundError):
            region.chmod(0o600)


@contextlib.contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """A context manager: the directory exists inside it."""
    directory = make_directory(prefix)
    try:
        yield directory
    finally:
        remove_directory(directory)


def _sweep(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*-{pid_namespace()}-*"):
        owner = path.name.removeprefix(prefix).partition("-")[0]
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            if owner.isdecimal() and not Path(f"/proc/{owner}").exists() and path.lstat().st_uid == os.getuid():
                remove_directory(path)
