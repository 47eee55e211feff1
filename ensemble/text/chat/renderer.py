"""Renders chat templates in processes of their own, under limits of time, memory and output.

A template is untrusted code, and Python can't interrupt one that computes 9**9**9 or a text of a terabyte. The
processes are started when they are first needed, and again after one has been ended. They end with this process, or
when `end_workers` is called.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_triton.ensemble.processes.child import python_path
from deepseek_triton.ensemble.processes.heartbeat import signal_name
from deepseek_triton.ensemble.text.errors import one_line

WORKER = "deepseek_triton.ensemble.text.chat.worker"
ATTEMPTS = 2
# Seconds beyond a rendering's own after which its process counts as frozen; and of one that is only starting.
LATE_S = 2.0
START_S = 30.0
NUM_WORKERS = 2  # renderings at once; a template that takes long holds up half of them


@dataclass(frozen=True)
class RenderLimits:
    """Seconds and bytes of address space of one rendering, and characters of its text."""

    max_s: float = 2.0
    max_bytes: int = 2**30
    max_chars: int = 2**26


DEFAULT_LIMITS = RenderLimits()


class RenderError(Exception):
    """A template made no prompt; the message is one line: why."""


class _Worker:
    """One process; started at the first job."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._limits: RenderLimits | None = None

    def render(self, job: bytes, limits: RenderLimits) -> dict[str, str]:
        """Give the job to the process; one that was killed or is frozen has another in its place, once."""
        status = 0
        for _ in range(ATTEMPTS):
            line = self._ask(job, limits)
            if line.endswith(b"\n"):
                result: dict[str, str] = json.loads(line)
                return result
            status = self.close()
            if status == -signal.SIGALRM:
                return {"error": f"it takes over {limits.max_s:g} s for them"}
        return {"error": f"the process that renders it {_how_it_ended(status)}, {ATTEMPTS} times"}

    def _ask(self, job: bytes, limits: RenderLimits) -> bytes:
        """The process's answer; not a whole line if it ended, or gave none in time and was killed."""
        is_new = self._process is None
        process = self._running(limits)
        assert process.stdin is not None and process.stdout is not None
        late = threading.Timer(limits.max_s + (START_S if is_new else LATE_S), process.kill)
        late.start()
        try:
            process.stdin.write(job + b"\n")
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:
            return b""
        finally:
            late.cancel()

    def close(self) -> int:
        """End the process; returns its exit status, 0 if there was none."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        with contextlib.suppress(OSError):  # a job that couldn't be written
            process.communicate()
        return process.wait()

    def _running(self, limits: RenderLimits) -> subprocess.Popen[bytes]:
        if (self._process is not None and (limits.max_s, limits.max_bytes) != self._kind) or self._has_ended():
            self.close()
        if self._process is None:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
            self._process = subprocess.Popen(
                [python_path(), "-m", WORKER, str(os.getpid())], env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._limits = limits
            assert self._process.stdin is not None
            head = {"max_s": limits.max_s, "max_bytes": limits.max_bytes}
            self._process.stdin.write(json.dumps(head).encode() + b"\n")
        return self._process

    @property
    def _kind(self) -> tuple[float, int] | None:
        return None if self._limits is None else (self._limits.max_s, self._limits.max_bytes)

    def _has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None


def _how_it_ended(status: int) -> str:
    return f"was killed by {signal_name(-status)}" if status < 0 else f"ended with status {status}"


_workers: queue.LifoQueue[_Worker] = queue.LifoQueue()
for _ in range(NUM_WORKERS):
    _workers.put(worker := _Worker())
    atexit.register(worker.close)


def end_workers() -> None:
    """End the processes that render nothing now; the next rendering starts one. For any thread."""
    idle = []
    with contextlib.suppress(queue.Empty):
        while True:
            idle.append(_workers.get_nowait())
    for worker in idle:
        worker.close()
        _workers.put(worker)


def render(source: str, variables: Mapping[str, Any], limits: RenderLimits = DEFAULT_LIMITS) -> str:
    """Return the text that the template `source` makes of `variables`, plain JSON values. For any thread.

    Raises:
        RenderError: the template raised an error or broke a limit.
    """
    try:
        job = json.dumps({"source": source, "variables": variables, "max_chars": limits.max_chars}).encode()
    except (ValueError, RecursionError) as error:
        raise RenderError(one_line(error)) from error
    worker = _workers.get()
    try:
        result = worker.render(job, limits)
    except BaseException:
        worker.close()  # its answer would be taken for the next job's
        raise
    finally:
        _workers.put(worker)
    if "error" in result:
        raise RenderError(result["error"])
    return result["text"]
