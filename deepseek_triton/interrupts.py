"""Ctrl-C that isn't lost, and that ends a command.

Python raises KeyboardInterrupt wherever the main thread is. In a finalizer, or in the callback of a weak reference or
of C code, it is printed ("Exception ignored in …"), and the program goes on as if nobody had pressed Ctrl-C. Between
taking a lock and the block that releases it (gRPC has such places), it leaves the lock taken, and whoever wants it next
waits for ever.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

AGAIN_S = 0.05  # by then the finalizer or callback has ended; if not, the next interrupt is sent again too
END_S = 10.0  # seconds, longer than it takes to cancel a call and close a connection
INTERRUPTED = 128 + int(signal.SIGINT)  # the exit status of a command, 130


@contextlib.contextmanager
def interrupts_arrive() -> Iterator[None]:
    """Send SIGINT again, a moment later, each time that Python ignored its KeyboardInterrupt. Also a decorator."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets interrupts
        yield
        return
    before, main, is_over = sys.unraisablehook, threading.get_ident(), threading.Event()

    def again() -> None:
        if not is_over.wait(AGAIN_S):
            signal.pthread_kill(main, signal.SIGINT)

    def see(ignored: Any) -> None:
        if isinstance(ignored.exc_value, KeyboardInterrupt):
            # No `threading.Thread`: the main thread may be inside one of threading's locks.
            _thread.start_new_thread(again, ())
        else:
            before(ignored)

    sys.unraisablehook = see
    try:
        yield
    finally:
        sys.unraisablehook = before
        is_over.set()


def end_within(seconds: float = END_S) -> None:
    """End the process, with status INTERRUPTED, if it still runs so many seconds later.

    For a process that was interrupted and has nothing more to do: at its end the interpreter waits for threads, which
    may be at work for long, or wait for a lock that the interrupt left taken.
    """

    def end() -> None:
        time.sleep(seconds)
        os._exit(INTERRUPTED)

    _thread.start_new_thread(end, ())  # the interpreter doesn't wait for it


@contextlib.contextmanager
def interrupts_end(within_s: float = END_S) -> Iterator[None]:
    """End the process, with status INTERRUPTED, where the block still runs so many seconds after a Ctrl-C.

    For commands that leave nothing half-done on this machine: no clean-up runs then. Where SIGINT has a handler that
    isn't Python's own, it stays.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    over = _thread.allocate_lock()  # whose methods are one call each: an interrupt can't leave it half-done
    over.acquire()

    def end() -> None:
        if over.acquire(timeout=within_s):
            over.release()  # for the next thread that waits
        else:
            os.write(2, b"error: interrupted, but a call doesn't end; this process ends without it\n")
            os._exit(INTERRUPTED)

    def strike(number: int, frame: FrameType | None) -> None:
        _thread.start_new_thread(end, ())  # as above
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, strike)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        over.release()
