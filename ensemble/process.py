"""A child process that ends when this one does, however this one ends.

It knows commands and signals, nothing about servers. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

# Runs in between, and becomes the command: Linux signals it when the thread that started it ends. Done after
# a fork in this interpreter (preexec_fn) it would not be safe beside other threads.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starting process has gone")
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"can't start {sys.argv[2]}: {error.strerror}")
"""


def launch(command: Sequence[str], environment: Mapping[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, its output in a new file at `log_path`.

    It gets SIGTERM when this process ends, even by SIGKILL.

    Raises:
        OSError: the log can't be written, or no process made.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
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

    # The signal comes when the starting *thread* ends: so let it be one that lasts as long as the child.
    threading.Thread(target=keep, name=f"keeper of {Path(command[0]).name}", daemon=True).start()
    is_started.wait()
    for error in errors:
        raise error
    return started[0]
