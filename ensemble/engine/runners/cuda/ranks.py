"""Rank 0's view of the other tensor-parallel ranks' processes.

It starts them, sends them each call, and watches them: if a rank fails, dies or hangs, all ranks end, with one line
that names the rank and the reason. They end by themselves when rank 0 is gone (worker.py). It knows nothing of what is
computed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.processes.child import python_path
from deepseek_triton.ensemble.text.errors import one_line

log = logging.getLogger(__name__)
WORKER = "deepseek_triton.ensemble.engine.runners.cuda.worker"
POLL_S = 0.1
END_S = 5.0  # for a rank to end by itself when it is told to
STUCK_S = 30.0  # after a rank failed during loading, this process is taken to hang
START_S = 900.0  # to read the weights; and again to compile and capture
STEP_S = 60.0  # for one call


@dataclass
class _Rank:
    """A rank's process, the pipe to it, and the pipe whose closing tells it that rank 0 ended."""

    number: int
    process: subprocess.Popen[bytes]
    pipe: Connection
    lifeline: int
    messages: list[Any] = field(default_factory=list)

    def read(self) -> None:
        """Receive the messages sent since the last call."""
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                self.messages.append(self.pipe.recv())

    def failure(self) -> str | None:
        """Why the rank failed, in one line; None: it hasn't."""
        status = self.process.poll()
        self.read()
        for what, text in self.messages:
            if what == "failed":
                return f"rank {self.number}: {text}"
        if status is None:
            return None
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"rank {self.number}'s process {how}"


class Ranks:
    """Ranks 1 … n of a model; this process is rank 0.

    Args:
        jobs: the `RankJob` of each, picklable; see worker.py.
        on_failure: called with the reason when a rank failed after `ready`; before it, only if this process hangs.
        start_s, step_s: seconds that loading, twice, and any call may take.
    """

    def __init__(
        self,
        jobs: Sequence[Any],
        *,
        on_failure: Callable[[str], None] | None = None,
        start_s: float = START_S,
        step_s: float = STEP_S,
    ) -> None:
        self._on_failure, self._start_s, self._step_s = on_failure, start_s, step_s
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._deadline: float | None = None
        self._is_ready = False
        self._is_closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._ranks: list[_Rank] = []
        try:
            for number, job in enumerate(jobs, start=1):
                self._ranks.append(_start(number))
                self._ranks[-1].pipe.send(job)
        except OSError as error:
            self.close()
            raise RunnerError(f"rank {len(self._ranks)} can't be started: {error}") from error

    @property
    def pids(self) -> list[int]:
        """Process ids, rank 1's first."""
        return [rank.process.pid for rank in self._ranks]

    def meet(self) -> None:
        """Wait until every rank has loaded its weights, and let all connect.

        Raises:
            RunnerError: one failed or took too long.
        """
        self._wait_for("loaded")
        self._deadline = time.monotonic() + self._start_s
        self._watcher.start()  # from here on this process may hang when a rank fails
        self.broadcast("join")

    def ready(self) -> None:
        """Wait until every rank can run.

        Raises:
            RunnerError: one failed or took too long.
        """
        self._wait_for("ready")
        with self._lock:
            self._is_ready, self._deadline = True, None
        self.check()

    def broadcast(self, name: str, *arguments: Any) -> None:
        """Send a call to every other rank.

        Raises:
            RunnerError: a rank has failed.
        """
        self.check()
        for rank in self._ranks:
            try:
                rank.pipe.send((name, arguments))
            except OSError as error:
                self._fail(self._settled_failure() or f"rank {rank.number} can't be reached: {error}")
                self.check()

    def check(self) -> None:
        """Raise the failure, if there is one.

        Raises:
            RunnerError: a rank has failed.
        """
        if self._failure is not None:
            raise RunnerError(self._failure)

    @contextlib.contextmanager
    def collective(self, *, is_launching: bool = True) -> Iterator[None]:
        """A context for a call that all ranks make: it has a time limit, and if it fails here, all ranks end.

        Args:
            is_launching: False: the call launches nothing, so a RunnerError leaves the ranks in step.

        Raises:
            RunnerError: a rank has failed, this one among them.
        """
        self.check()
        with self._lock:
            self._deadline = time.monotonic() + self._step_s
        try:
            yield
        except Exception as error:
            if not is_launching and isinstance(error, RunnerError):
                raise
            self.check()  # a failure that is known already
            message = self._settled_failure() or f"rank 0: {one_line(error)}"
            self._fail(message)
            raise RunnerError(self._failure or message) from error
        finally:
            with self._lock:
                self._deadline = None
        self.check()

    def close(self) -> None:
        """End all ranks; a second call does nothing."""
        self._is_closed.set()
        if self._failure is None:
            for rank in self._ranks:
                with contextlib.suppress(OSError):
                    rank.pipe.send(("close", ()))
        if self._watcher.is_alive() and threading.current_thread() is not self._watcher:
            self._watcher.join()

    def wait_until_gone(self) -> None:
        """Wait for the ranks to end, and kill those that don't."""
        deadline = time.monotonic() + END_S
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
            rank.pipe.close()
            os.close(rank.lifeline)
        self._ranks.clear()

    def _wait_for(self, word: str) -> None:
        deadline = time.monotonic() + self._start_s
        while True:
            self.check()
            if (failure := self._failure_of_ranks()) is not None:
                self._fail(failure)
                continue
            late = [rank.number for rank in self._ranks if (word, "") not in rank.messages]
            if not late:
                return
            if time.monotonic() > deadline:
                self._fail(f"rank {late[0]} isn't {word} after {self._start_s:.0f} s")
                continue
            time.sleep(POLL_S)

    def _settled_failure(self) -> str | None:
        """Why another rank failed. Its failure makes this rank's call fail too, maybe before its end is seen."""
        time.sleep(2 * POLL_S)
        return self._failure_of_ranks()

    def _failure_of_ranks(self) -> str | None:
        """A rank's failure; that of a killed rank before those of ranks that fail because of it."""
        with self._lock:
            failures = [(rank.process.poll(), text) for rank in self._ranks if (text := rank.failure()) is not None]
        return min(failures, key=lambda entry: entry[0] is None or entry[0] >= 0)[1] if failures else None

    def _watch(self) -> None:
        while not self._is_closed.wait(POLL_S):
            failure = self._failure_of_ranks()
            deadline = self._deadline
            if failure is None and deadline is not None and time.monotonic() > deadline:
                limit = self._step_s if self._is_ready else self._start_s
                failure = f"a rank hangs: a call has taken more than {limit:.0f} s"
            if failure is not None:
                self._fail(failure)
                return

    def _fail(self, message: str) -> None:
        """Kill all other ranks, and report why."""
        with self._lock:
            if self._failure is not None or self._is_closed.is_set():
                return
            self._failure = message
            for rank in self._ranks:
                rank.process.kill()
        log.error("%s; the model ends", message)
        if self._on_failure is None:
            return
        if self._is_ready:
            self._on_failure(message)
        elif threading.current_thread() is self._watcher and not self._is_closed.wait(STUCK_S):
            self._on_failure(message)  # loading hangs


def _start(number: int) -> _Rank:
    ours, theirs = Pipe()
    read_end, write_end = os.pipe()
    command = [python_path(), "-m", WORKER, str(theirs.fileno()), str(read_end)]
    # sys.path of this process: in a Python model inside Triton it has more than PYTHONPATH.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=(theirs.fileno(), read_end),
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which ends the ranks
        )
    except OSError:
        os.close(write_end)
        raise
    finally:
        theirs.close()
        os.close(read_end)
    return _Rank(number, process, ours, write_end)


def end_process(message: str) -> None:
    """Kill this process, which may wait for its GPU for ever; the watchdog then ends the server."""
    os.kill(os.getpid(), signal.SIGKILL)
