"""Becomes a command that ends with the process that started it, and whose children end with it.

    python -I -S launcher.py STARTER_PID GRACE_S COMMAND [ARGUMENT ...]

The command gets SIGTERM when its starter has died, and `GRACE_S` seconds from then. Once it has ended, a guard kills
what is left of its process group, which it must lead: Triton's stubs don't always notice that their server is gone.

A program of its own, because a process with threads can't safely do this between fork and exec. Linux 5.3 or later.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1


def guard(starter_pid: int, grace_s: float) -> None:
    """Wait for the group leader's end, or the starter's and then `grace_s` at most; kill the group, this one too."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        leader = os.pidfd_open(os.getpgrp())
        starter = os.pidfd_open(starter_pid)
        ended, _, _ = select.select([leader, starter], [], [])
        if leader not in ended:
            select.select([leader], [], [], grace_s)
    except ProcessLookupError:
        pass  # one of them was gone already
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Start the guard and become the command."""
    starter_pid, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    # Linux sends the signal when the thread that started this process ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != starter_pid:
        sys.exit("the starting process has gone")
    if os.fork() == 0:
        guard(starter_pid, grace_s)
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"can't start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
