"""The processes of one served model watch each other: one that finds another one dead ends the server.

All are children of one tritonserver. Triton 2.51 doesn't restart a model whose process has died: the requests in flight
hang for ever and later ones fail, while the server calls itself ready. When the server ends, clients get an error at
once, and whoever runs it (`deepseek-triton serve`, a container's restart policy) starts it again. A process that finds
the server dead ends itself: Triton's code in it may wait for ever for a lock that the server held.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from deepseek_triton.ensemble.processes.child import stat_fields

log = logging.getLogger(__name__)
POLL_S = 0.25
PARTS = ("tokenizer", "engine", "detokenizer")


def meeting_point(name: str, version: str | int, what: str, server_pid: int | None = None) -> Path:
    """The path of the file `what` that the processes of version `version` of the served model `name` share.

    Raises:
        PermissionError: the directory belongs to another user.
    """
    server_pid = os.getppid() if server_pid is None else server_pid
    directory = Path(tempfile.gettempdir()) / f"deepseek-triton-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "belongs to another user", str(directory))
    return directory / f"{server_pid}-{sha256(name.encode()).hexdigest()[:16]}-{version}.{what}"


def watch(name: str, version: str | int, part: str) -> Watchdog:
    """Start the watchdog of process `part`, one of PARTS, of version `version` of the served model `name`."""
    own, *others = (meeting_point(name, version, what) for what in (part, *(p for p in PARTS if p != part)))
    watchdog = Watchdog(own, others)
    watchdog.start()
    return watchdog


def find_server() -> int:
    """The process id of the server that started this process. It may have died; this process then has another parent.

    Triton passes its id to a stub as the fifth argument (stub_launcher.cc of the Python backend).
    """
    parent = os.getppid()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if Path(f"/proc/{parent}/comm").read_text().strip() == "tritonserver":
            return parent
    program, *arguments = Path("/proc/self/cmdline").read_text(errors="replace").split("\0")
    if program.endswith("triton_python_backend_stub") and len(arguments) > 4 and arguments[4].isdecimal():
        return int(arguments[4])
    return parent


class Watchdog:
    """Ends the server when another process of the model has died, and this process when the server has died.

    Args:
        own: the file that this process writes its id to. `close` removes it; a killed process leaves it.
        others: the files that the other processes write theirs to.
        end_server: ends the server; None: kill it, by its process id.
    """

    def __init__(self, own: Path, others: Sequence[Path], end_server: Callable[[], None] | None = None) -> None:
        self._own = own
        self._others = tuple(others)
        self._server_pid = find_server()
        self._end_server = end_server or self._kill_server
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        _remove_leftovers(own.parent)
        part = own.with_name(f"{own.name}.part")
        part.write_text(str(os.getpid()))
        part.replace(own)

    def start(self) -> None:
        """Watch, on a separate thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching, and remove the file by which the others watch this process."""
        self._is_closed.set()
        self._own.unlink(missing_ok=True)
        if self._thread.is_alive():
            self._thread.join()

    def find_dead(self) -> Path | None:
        """The file of a process that has died without removing it, if there is one."""
        return next((path for path in self._others if _is_dead(path)), None)

    def _run(self) -> None:
        while not self._is_closed.wait(POLL_S):
            if os.getppid() != self._server_pid:
                log.error("the server has died; ending this process")
                os._exit(1)
            if (dead := self.find_dead()) is not None:
                log.error(
                    "the %s's process has died; ending the server, which would hang", dead.suffix.removeprefix(".")
                )
                self._end_server()
                return

    def _kill_server(self) -> None:
        # Not SIGTERM: the server would wait for the requests in flight, which never end.
        os.kill(self._server_pid, signal.SIGKILL)


def _is_dead(path: Path) -> bool:
    try:
        pid = int(path.read_text())
    except FileNotFoundError:
        return False  # it hasn't started yet, or has ended regularly
    try:
        state = stat_fields(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        return path.exists()
    return state in ("Z", "X")


def _remove_leftovers(directory: Path) -> None:
    """Remove the files of processes whose servers have ended."""
    for path in directory.iterdir():
        pid = path.name.partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
