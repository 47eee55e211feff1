"""The processes of a model that is split over several GPUs, as their first one sees them.

It starts the others, tells them what it is about to do, and watches them: a rank that fails, dies or hangs ends all of
them, with one line that says which and why. They end by themselves when the first one is gone (worker.py). It knows
nothing of what is computed.
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
from pathlib import Path
from typing import Any

from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.text.errors import one_line

log = logging.getLogger(__name__)
WORKER = "deepseek_triton.ensemble.engine.runners.cuda.worker"
POLL_S = 0.1
END_S = 5.0  # for a rank to end by itself when it is told to
STUCK_S = 30.0  # after which this process, loading beside a rank that has failed, is taken to hang
START_S = 900.0  # to read the weights; and again to compile and capture
STEP_S = 60.0  # for one call


@dataclass
class _Rank:
    """A process, the pipe to it, and the pipe whose end it takes for ours."""

    number: int
    process: subprocess.Popen[bytes]
    pipe: Connection
    lifeline: int
    said: list[Any] = field(default_factory=list)

    def read(self) -> None:
        """Take in what it has said since the last time."""
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll():
                self.said.append(self.pipe.recv())

    def complaint(self) -> str | None:
        """Why it can't go on, in one line; None: it can."""
        status = self.process.poll()
        self.read()
        for what, text in self.said:
            if what == "failed":
                return f"rank {self.number}: {text}"
        if status is None:
            return None
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"rank {self.number}'s process {how}"


class Ranks:
    """Ranks 1 … n of a model; this process is rank 0.

    Args:
        jobs: what each of them is given, picklable; see worker.py.
        on_failure: called, with the line, when one has failed after `ready`, or before if this process hangs with it.
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
        """Wait until every rank has its weights, and let all connect.

        Raises:
            RunnerError: one failed or took too long.
        """
        self._wait_for("loaded")
        self._deadline = time.monotonic() + self._start_s
        self._watcher.start()  # from here on this process may hang when one of them fails
        self.tell("join")

    def ready(self) -> None:
        """Wait until every rank can run.

        Raises:
            RunnerError: one failed or took too long.
        """
        self._wait_for("ready")
        with self._lock:
            self._is_ready, self._deadline = True, None
        self.check()

    def tell(self, name: str, *arguments: Any) -> None:
        """Tell every rank what this one does now.

        Raises:
            RunnerError: a rank has failed.
        """
        self.check()
        for rank in self._ranks:
            try:
                rank.pipe.send((name, arguments))
            except OSError as error:
                self._fail(self._first_cause() or f"rank {rank.number} takes no calls: {error}")
                self.check()

    def check(self) -> None:
        """Raise what has gone wrong, if something has.

        Raises:
            RunnerError: that.
        """
        if self._failure is not None:
            raise RunnerError(self._failure)

    @contextlib.contextmanager
    def together(self, *, is_launching: bool = True) -> Iterator[None]:
        """Around what all ranks do: it takes its time at most, and when it fails here all of them end.

        Args:
            is_launching: False: what is done here launches nothing, and may be refused without harm.

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
            self.check()  # what has failed is known
            message = self._first_cause() or f"rank 0: {one_line(error)}"
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
            if (complaint := self._complaint()) is not None:
                self._fail(complaint)
                continue
            late = [rank.number for rank in self._ranks if (word, "") not in rank.said]
            if not late:
                return
            if time.monotonic() > deadline:
                self._fail(f"rank {late[0]} isn't {word} after {self._start_s:.0f} s")
                continue
            time.sleep(POLL_S)

    def _first_cause(self) -> str | None:
        """When another rank goes, what this one does fails too, maybe before the other is seen to have gone."""
        time.sleep(2 * POLL_S)
        return self._complaint()

    def _complaint(self) -> str | None:
        """What one of the ranks can't go on for: rather one that was killed than one that misses it."""
        with self._lock:
            complaints = [(rank.process.poll(), text) for rank in self._ranks if (text := rank.complaint()) is not None]
        return min(complaints, key=lambda entry: entry[0] is None or entry[0] >= 0)[1] if complaints else None

    def _watch(self) -> None:
        while not self._is_closed.wait(POLL_S):
            complaint = self._complaint()
            deadline = self._deadline
            if complaint is None and deadline is not None and time.monotonic() > deadline:
                limit = self._step_s if self._is_ready else self._start_s
                complaint = f"a rank hangs: a call has taken more than {limit:.0f} s"
            if complaint is not None:
                self._fail(complaint)
                return

    def _fail(self, message: str) -> None:
        """End all other ranks, which then can't go on, and say why."""
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
            self._on_failure(message)  # loading neither goes on nor fails: this process is stuck


def _start(number: int) -> _Rank:
    ours, theirs = Pipe()
    read_end, write_end = os.pipe()
    command = [python(), "-m", WORKER, str(theirs.fileno()), str(read_end)]
    # The path of this process: in a Python model of Triton's it isn't the environment's alone.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=(theirs.fileno(), read_end),
            start_new_session=True,  # a terminal's Ctrl-C is for this process, which tells them
        )
    except OSError:
        os.close(write_end)
        raise
    finally:
        theirs.close()
        os.close(read_end)
    return _Rank(number, process, ours, write_end)


def python() -> str:
    """This process's interpreter; where it is embedded in another program, its environment's."""
    name = f"python{sys.version_info.major}"
    candidates = (sys.executable, f"{sys.prefix}/bin/{name}", f"{sys.exec_prefix}/bin/{name}")
    is_python = (path for path in candidates if path and Path(path).name.startswith("python"))
    return next((path for path in is_python if os.access(path, os.X_OK)), name)


def end_process(message: str) -> None:
    """End this process at once, for it may be waiting on its GPU for ever; whoever watches it ends the server."""
    os.kill(os.getpid(), signal.SIGKILL)
