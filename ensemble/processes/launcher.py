"""A program that replaces itself by a command; the command ends with the process that started it.

    python -I -S launcher.py STARTER_PID GRACE_S IS_HELD COMMAND [ARGUMENT ...]

When its starter has died, the command gets SIGTERM, and SIGKILL `GRACE_S` seconds later. Once the command has ended, a
guard process kills the rest of its process group, which the command must lead: Triton's stubs don't always notice that
their server is gone.

With IS_HELD 1 the starter holds the command at its start (ensemble/processes/hidden_arguments.py).

It is a separate program because a process with threads can't do this safely between fork and exec. Linux 5.3 or later.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1
PTRACE_TRACEME = 0


def guard(starter_pid: int, grace_s: float) -> None:
    """Wait until the group's leader ends, at most `grace_s` after the starter has; then kill the whole group."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        leader = os.pidfd_open(os.getpgrp())
        starter = os.pidfd_open(starter_pid)
        ended, _, _ = select.select([leader, starter], [], [])
        if leader not in ended:
            select.select([leader], [], [], grace_s)
    except ProcessLookupError:
        pass  # one of them has ended already
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Start the guard and become the command."""
    starter_pid, grace_s, is_held, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "1", sys.argv[4:]
    # Linux sends the signal when the thread that started this process ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != starter_pid:
        sys.exit("the starting process has gone")
    if os.fork() == 0:
        guard(starter_pid, grace_s)
    if is_held and ctypes.CDLL(None).ptrace(PTRACE_TRACEME, 0, None, None) != 0:
        sys.exit("Linux doesn't let this program be held at its start")
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"can't start {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
