"""Finds out whether another process has died or is frozen, by a file that it touches and by /proc.

A process beats by touching its file. An observer looks at the file at equal intervals and counts its own looks, not
seconds: when a whole machine or container was suspended, nobody counts as frozen afterwards. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from deepseek_triton.ensemble.processes.stat import stat_fields

POLL_S = 0.25  # seconds between two beats, and between two looks
# Looks without a beat after which a process is frozen that meanwhile has used no CPU, nor waits for a CPU or a disk.
FROZEN_LOOKS = 4
HUNG_LOOKS = 40  # and one that works on something, or is kept from working
DEAD_STATES = ("Z", "X")
STOPPED_STATES = ("T", "t")
BUSY_STATES = ("R", "D")


def begin(path: Path) -> None:
    """Write this process's id to `path`."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(str(os.getpid()))
    part.replace(path)


def beat(path: Path) -> None:
    """Touch `path`; written again if something has removed it."""
    try:
        os.utime(path)
    except FileNotFoundError:
        with contextlib.suppress(OSError):  # a full disk, or a directory that is gone: the next beat tries again
            begin(path)


class ProcessObserver:
    """Observes one process: call `fault` every POLL_S seconds.

    Args:
        path: the file that the process beats; it removes the file when it ends regularly.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beat: tuple[int, int] | None = None  # the file's inode and time of change
        self._missed = 0
        self._stopped = 0  # looks in a row at which it was stopped
        self._cpu_ticks = 0

    def fault(self) -> str | None:
        """What is wrong with the process: "was killed by SIGKILL", "is frozen", …; None if nothing is."""
        try:
            pid = int(self._path.read_text())
            status = self._path.stat()
        except (OSError, ValueError):
            self._beat = None
            return None  # it hasn't started yet, or has ended regularly
        fields = _fields(pid)
        if fields is None:
            return "has died" if self._path.exists() else None
        if fields[0] in DEAD_STATES:
            return how_it_ended(fields)
        # What it did between its last beat and the signal doesn't matter.
        self._stopped = self._stopped + 1 if fields[0] in STOPPED_STATES else 0
        newest, ticks = (status.st_ino, status.st_mtime_ns), _cpu_ticks(fields)
        if newest != self._beat:
            self._beat, self._missed, self._cpu_ticks = newest, 0, ticks
            return None
        self._missed += 1
        is_idle = ticks == self._cpu_ticks and not _is_busy(pid)
        if self._stopped >= FROZEN_LOOKS:
            return "is stopped by a signal"
        if self._missed >= HUNG_LOOKS or (self._missed >= FROZEN_LOOKS and is_idle):
            return "is stopped by a signal" if self._stopped else "is frozen"
        return None


class StopObserver:
    """Observes a process that doesn't beat, for being stopped by a signal; call `is_stopped` every POLL_S seconds."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._looks = 0

    def is_stopped(self) -> bool:
        """Whether the process has been stopped at FROZEN_LOOKS looks in a row."""
        fields = _fields(self._pid)
        self._looks = self._looks + 1 if fields is not None and fields[0] in STOPPED_STATES else 0
        return self._looks >= FROZEN_LOOKS


def how_it_ended(fields: list[str]) -> str:
    """How a zombie ended, by the fields of its /proc/PID/stat from the third on."""
    status = int(fields[49])  # as waitpid gives it; 0 where this process may not know
    if status and os.WIFSIGNALED(status):
        return f"was killed by {signal_name(os.WTERMSIG(status))}"
    return f"ended with status {os.WEXITSTATUS(status)}" if status else "has died"


def signal_name(number: int) -> str:
    """9 → SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _fields(pid: int) -> list[str] | None:
    try:
        return stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return None


def _cpu_ticks(fields: list[str]) -> int:
    return int(fields[11]) + int(fields[12])


def _is_busy(pid: int) -> bool:
    """Whether a thread runs, or waits for a CPU or a disk."""
    for path in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if stat_fields(f"{pid}/task/{path.name}")[0] in BUSY_STATES:
                return True
    return False
