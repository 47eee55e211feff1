"""A built model in a process of its own, so that its memory is its own and its end leaves nothing."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.gate.limits import Check
from deepseek_triton.builders.lifecycle.gate.measure import GateFigures
from deepseek_triton.builders.lifecycle.learning.examples import Lesson
from deepseek_triton.ensemble.processes.launcher import PR_SET_PDEATHSIG

GRACE_S = 10.0


class BuiltProcess:
    """`BuiltSubject`'s calls, computed by a child, which ends when this process ends, however it ends."""

    def __init__(self, repository: Path, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._ours, theirs = context.Pipe()
        # Not a daemon: a tensor-parallel runner starts processes of its own.
        self._process = context.Process(target=_serve, args=(theirs, repository, name), name=f"gate-{name}")
        self._process.start()
        theirs.close()

    def measure(self, data: Mapping[str, Sequence[Lesson]], checks: Sequence[Check], window_len: int) -> GateFigures:
        """See `BuiltSubject`."""
        found: GateFigures = self._call("measure", dict(data), tuple(checks), window_len)
        return found

    def tokens_per_s(self) -> float:
        """See `BuiltSubject`."""
        return float(self._call("tokens_per_s"))

    def close(self) -> None:
        """End the child."""
        self._ours.close()
        self._process.join(GRACE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            self._ours.send((method, arguments))
            found = self._ours.recv()
        except (EOFError, OSError) as error:
            raise BuildError(f"{self._name} can't be judged here: the process that runs it ended") from error
        if isinstance(found, BuildError):
            raise found
        return found


def _serve(connection: Connection, repository: Path, name: str) -> None:
    """The child: load the model at the first call, and answer calls until the other side closes."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, which ends this one
    from deepseek_triton.builders.lifecycle.gate.built_model import BuiltSubject
    from deepseek_triton.ensemble.text.chat import end_workers

    subject: BuiltSubject | None = None
    try:
        while True:
            try:
                method, arguments = connection.recv()
            except EOFError:
                return
            try:
                subject = subject or BuiltSubject(repository, name)
                found = getattr(subject, method)(*arguments)
            except BuildError as error:
                found = BuildError(str(error))
            connection.send(found)
    finally:
        end_workers()
