"""What Linux says of a process in /proc."""

from __future__ import annotations

from pathlib import Path


def pid_namespace() -> int:
    """What tells apart the process ids of containers that share a directory: the number of this process's namespace."""
    return Path("/proc/self/ns/pid").stat().st_ino


def stat_fields(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third on: state, parent's id, process group's id, …

    Raises:
        FileNotFoundError, ProcessLookupError: there is no such process.
    """
    # The second field is the command in parentheses, which may itself hold parentheses and spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
