"""The processes of one served model watch each other: one that finds another one dead or frozen ends the server.

All are children of one tritonserver. Triton 2.51 doesn't restart a model whose process has died: the requests in flight
hang for ever and later ones fail, while the server calls itself ready. When the server ends, clients get an error at
once, and whoever runs it (`deepseek-triton serve`, a container's restart policy) starts it again. A process that finds
the server dead ends itself: Triton's code in it may wait for ever for a lock that the server held.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

from deepseek_triton.ensemble.processes.heartbeat import POLL_S, ProcessObserver, StopObserver, beat, begin
from deepseek_triton.ensemble.processes.stat import pid_namespace
from deepseek_triton.ensemble.processes.temp_dirs import make_private

log = logging.getLogger(__name__)
PARTS = ("tokenizer", "engine", "detokenizer", "infer")  # where a model has no such process, there is no file


def meeting_point(name: str, version: str | int, what: str, server_pid: int | None = None) -> Path:
    """The path of the file `what` that the processes of version `version` of the served model `name` share.

    Raises:
        PermissionError: the directory isn't this user's own and closed to others.
    """
    server_pid = os.getppid() if server_pid is None else server_pid
    return _directory() / f"{server_pid}-{sha256(name.encode()).hexdigest()[:16]}-{version}.{what}"


def process_files(server_pid: int) -> list[Path]:
    """The files that the processes under a server beat, of all its models."""
    return [path for part in PARTS for path in _directory().glob(f"{server_pid}-*.{part}")]


def _directory() -> Path:
    # Containers may share the directory for temporary files; process ids mean something in one namespace alone.
    directory = temporary_parent() / f"deepseek-triton-{os.getuid()}-{pid_namespace()}"
    make_private(directory)
    return directory


def temporary_parent() -> Path:
    """The directory for temporary files, the same for all processes of a server.

    tempfile.gettempdir() takes another one while the disk is full: processes that start then would not find the others.
    """
    given = (Path(os.environ.get(name) or "") for name in ("TMPDIR", "TEMP", "TMP"))
    return next((path for path in given if path.is_absolute() and path.is_dir()), Path("/tmp"))


def watch(name: str, version: str | int, part: str, is_healthy: Callable[[], bool] = lambda: True) -> Watchdog:
    """Start the watchdog of process `part`, one of PARTS, of version `version` of the served model `name`.

    The process counts as frozen while `is_healthy` is false.
    """
    own, *others = (meeting_point(name, version, what) for what in (part, *(p for p in PARTS if p != part)))
    watchdog = Watchdog(own, others, is_healthy=is_healthy, name=name)
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
    """Ends the server when another process of the model is dead or frozen, and this process when the server has died.

    Args:
        own: the file that this process beats. `close` removes it; a killed process leaves it.
        others: the files that the other processes beat.
        end_server: ends the server; None: kill it, by its process id.
        is_healthy: whether this process may go on beating.
        name: of the served model, for the log.
    """

    def __init__(
        self,
        own: Path,
        others: Sequence[Path],
        end_server: Callable[[], None] | None = None,
        is_healthy: Callable[[], bool] = lambda: True,
        name: str = "",
    ) -> None:
        self._name = name
        self._own = own
        self._others = {path.suffix.removeprefix("."): ProcessObserver(path) for path in others}
        self._server_pid = find_server()
        self._server = StopObserver(self._server_pid)
        self._end_server = end_server or self._kill_server
        self._is_healthy = is_healthy
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        _remove_leftovers(own.parent)
        begin(own)

    def start(self) -> None:
        """Watch, on a separate thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching, and remove the file by which the others watch this process."""
        self._is_closed.set()
        self._own.unlink(missing_ok=True)
        if self._thread.is_alive():
            self._thread.join()

    def find_fault(self) -> str | None:
        """What is wrong with the server or another process of the model; None if nothing is."""
        if self._server.is_stopped():
            return "tritonserver is stopped by a signal"
        faults = {part: observer.fault() for part, observer in self._others.items()}
        return next((f"the {part}'s process {fault}" for part, fault in faults.items() if fault is not None), None)

    def _run(self) -> None:
        while not self._is_closed.wait(POLL_S):
            if os.getppid() != self._server_pid:
                log.error("the server has died; ending this process")
                os._exit(1)
            if self._is_healthy():
                beat(self._own)
            if (fault := self.find_fault()) is not None:
                log.error("%s; ending the server, which would hang (model %s)", fault, self._name)
                self._end_server()
                return

    def _kill_server(self) -> None:
        # Not SIGTERM: the server would wait for the requests in flight, which never end.
        os.kill(self._server_pid, signal.SIGKILL)


def _remove_leftovers(directory: Path) -> None:
    """Remove the files of processes whose servers have ended."""
    for path in directory.iterdir():
        pid = path.name.partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
