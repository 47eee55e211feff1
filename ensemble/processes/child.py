"""Start a child process that ends when this process ends, even by SIGKILL; its own children end with it.

It knows commands and signals, nothing about servers. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_LAUNCHER = Path(__file__).with_name("launcher.py")


def launch(
    command: Sequence[str], environment: Mapping[str, str], log_path: Path, grace_s: float
) -> subprocess.Popen[bytes]:
    """Start `command`, a program's path and its arguments, in a session of its own; its output goes to `log_path`.

    It gets SIGTERM when this process ends, even by SIGKILL, and SIGKILL `grace_s` seconds later. Its own children, but
    for those in another process group, are killed when it ends.

    Raises:
        OSError: the log can't be written, or no process made.
    """
    launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), str(grace_s)]
    started: list[subprocess.Popen[bytes]] = []
    errors: list[OSError] = []
    is_started = threading.Event()

    def keep() -> None:
        try:
            with log_path.open("wb") as log:
                process = subprocess.Popen(
                    [*launcher, *command],
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            started.append(process)
        except OSError as error:
            errors.append(error)
            return
        finally:
            is_started.set()
        process.wait()

    # Linux sends the signal when the *thread* that started the child ends, so this thread lasts as long as the child.
    threading.Thread(target=keep, name=f"keeper of {Path(command[0]).name}", daemon=True).start()
    is_started.wait()
    for error in errors:
        raise error
    return started[0]


def stat_fields(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third on: state, parent's id, process group's id, …

    Raises:
        FileNotFoundError, ProcessLookupError: there is no such process.
    """
    # The second field is the command in parentheses, which may itself hold parentheses and spaces.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def has_dead_child(parent: int) -> bool:
    """Whether process `parent` has a zombie: a child that has ended and whose exit status was not read."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, its_parent = stat_fields(path.name)[:2]
            if int(its_parent) == parent and state == "Z":
                return True
    return False
