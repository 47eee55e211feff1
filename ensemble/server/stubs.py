"""The processes of a server's Python models (Triton calls them stubs), while the models load."""

from __future__ import annotations

import contextlib
from pathlib import Path

from deepseek_triton.ensemble.processes.stat import stat_fields


class LoadObserver:
    """Finds the dead children of a server that loads its models; call `look` several times a second.

    Triton 2.51 waits for ever for a stub that died before they had met. A dead child's model is known if an earlier
    look found it alive.
    """

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._models: dict[int, str] = {}  # a stub's process id → the model
        self._dead: list[int] = []
        self._dead_since: float | None = None

    def look(self, now: float) -> float:
        """Look at the children at `now`, seconds; returns for how many seconds one has been dead, 0: none is."""
        states = _children(self._server_pid)
        for pid, state in states.items():
            if state != "Z" and pid not in self._models and (model := _model(pid)) is not None:
                self._models[pid] = model
        self._dead = [pid for pid, state in states.items() if state == "Z"]
        if not self._dead:
            self._dead_since = None
            return 0.0
        self._dead_since = now if self._dead_since is None else self._dead_since
        return now - self._dead_since

    def dead_models(self) -> list[str]:
        """The models of the children that were dead at the last look, as far as known."""
        return list(dict.fromkeys(self._models[pid] for pid in self._dead if pid in self._models))


def _children(parent: int) -> dict[int, str]:
    """The children of process `parent` with their states."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, its_parent = stat_fields(path.name)[:2]
            if int(its_parent) == parent:
                found[int(path.name)] = state
    return found


def _model(pid: int) -> str | None:
    """The model of a stub, by its command: it gets REPOSITORY/MODEL/VERSION/model.py."""
    with contextlib.suppress(OSError):
        for word in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[1:]:
            path = Path(word)
            if path.name == "model.py" and len(path.parts) > 3:
                return path.parents[1].name
    return None
