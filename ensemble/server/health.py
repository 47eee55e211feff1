"""Asks the processes of a running tritonserver whether they are well: the engines by their beats, the server by HTTP.

Models of other kinds than this project's don't beat, and are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepseek_triton.ensemble.processes.heartbeat import POLL_S, ProcessObserver, StopObserver
from deepseek_triton.ensemble.processes.watchdog import process_files

PROBE_S = 1.0  # seconds between two questions over HTTP
# A server that is merely busy, or flooded with connections, must not be ended for it.
MAX_SILENT_PROBES = 60


class HealthCheck:
    """Checks one server; call `fault` every POLL_S seconds.

    Args:
        server_pid: the process id of tritonserver.
        is_live: asks the server over HTTP whether it lives.
    """

    def __init__(self, server_pid: int, is_live: Callable[[], bool]) -> None:
        self._server_pid = server_pid
        self._is_live = is_live
        self._server = StopObserver(server_pid)
        self._observers: dict[Path, ProcessObserver] = {}
        self._looks = 0
        self._silent_probes = 0

    def fault(self) -> str | None:
        """What is wrong: "the engine's process is frozen"; None if nothing is."""
        if self._server.is_stopped():
            return "tritonserver is stopped by a signal"
        for path in process_files(self._server_pid):
            observer = self._observers.setdefault(path, ProcessObserver(path))
            if (fault := observer.fault()) is not None:
                return f"the {path.suffix.removeprefix('.')}'s process {fault}"
        self._looks += 1
        if self._looks % round(PROBE_S / POLL_S) == 0:
            self._silent_probes = 0 if self._is_live() else self._silent_probes + 1
        if self._silent_probes >= MAX_SILENT_PROBES:
            return f"tritonserver has not answered for {MAX_SILENT_PROBES * PROBE_S:.0f} s"
        return None
