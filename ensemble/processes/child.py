"""Start a child process that ends when this process ends, even by SIGKILL; its own children end with it.

It knows commands and signals, nothing about servers. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepseek_triton.ensemble.processes.hidden_arguments import reveal

_LAUNCHER = Path(__file__).with_name("launcher.py")


def launch(
    command: Sequence[str],
    environment: Mapping[str, str],
    log_path: Path,
    grace_s: float,
    hidden: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command`, a program's path and its arguments, in a session of its own; its output goes to `log_path`.

    It gets SIGTERM when this process ends, even by SIGKILL, and SIGKILL `grace_s` seconds later. Its own children, but
    for those in another process group, are killed when it ends.

    Args:
        hidden: an argument of `command` → the variable of `environment` that holds the one to use in its place, so that
            other users don't read it in the list of processes.

    Raises:
        OSError: the log can't be written, no process made, or no argument hidden.
    """
    launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), str(grace_s), "1" if hidden else "0"]
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
            if hidden:
                try:
                    reveal(process.pid, hidden)
                except BaseException:
                    process.kill()
                    process.wait()
                    raise
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


def python_path() -> str:
    """Path of this process's Python interpreter; if it is embedded in another program, that of its environment."""
    name = f"python{sys.version_info.major}"
    candidates = (sys.executable, f"{sys.prefix}/bin/{name}", f"{sys.exec_prefix}/bin/{name}")
    is_python = (path for path in candidates if path and Path(path).name.startswith("python"))
    return next((path for path in is_python if os.access(path, os.X_OK)), name)
