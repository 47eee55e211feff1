"""Worker threads for a client's costly wishes, which yield the CPU to everything else. Linux only."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from deepseek_triton.ensemble.protocol.contract import RETRY

NICENESS = 10  # above the process's: its other threads get nine times as much of a CPU each
MAX_NICENESS = 19

Result = TypeVar("Result")


class BusyError(Exception):
    """Too much waits already; one line for the client."""


class LowPriorityPool:
    """Runs jobs on up to `num_threads` threads; at most `max_waiting` jobs wait."""

    def __init__(self, num_threads: int, max_waiting: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name, initializer=lower_priority)
        self._places = threading.BoundedSemaphore(num_threads + max_waiting)
        self._name = name

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Run `job` as soon as a thread is free.

        Raises:
            BusyError: too many jobs wait.
        """
        if not self._places.acquire(blocking=False):
            raise BusyError(f"too many requests wait for the {self._name}{RETRY}")
        future = self._pool.submit(job)
        future.add_done_callback(lambda _: self._places.release())
        return future

    def close(self) -> None:
        """Drop the jobs that wait; those that run go on."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def lower_priority(by: int = NICENESS) -> None:
    """Let this thread alone yield to the others of the process: Linux gives each thread a niceness of its own."""
    niceness = min(MAX_NICENESS, os.getpriority(os.PRIO_PROCESS, os.getpid()) + by)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
