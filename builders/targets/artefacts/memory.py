"""How much memory this machine has."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def host_memory_bytes() -> int:
    """The machine's memory, or the container's limit where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        return min(total, int(CGROUP_LIMIT.read_text()))
    return total
