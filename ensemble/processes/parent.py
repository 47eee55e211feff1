"""End this process when the process that started it ends, whatever this one is doing and whoever holds its pipes."""

from __future__ import annotations

import os
import select
import threading


def end_with(parent: int) -> None:
    """Watch process `parent`, which started this one, on a thread; this process ends with status 1 when it has ended.

    The end of standard input doesn't do for that: a process that `parent` forked may hold the pipe open.
    """
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() != parent:  # it ended before, and its id may be another's by now
        os._exit(1)

    def wait() -> None:
        select.select([descriptor], [], [])
        os._exit(1)  # the main thread may be busy

    threading.Thread(target=wait, name="parent", daemon=True).start()
