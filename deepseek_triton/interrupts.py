"""Ctrl-C that isn't lost.

Python raises KeyboardInterrupt wherever the main thread is. In a finalizer, or in the callback of a weak reference or
of C code, it is printed ("Exception ignored in …"), and the program goes on as if nobody had pressed Ctrl-C.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

AGAIN_S = 0.05  # by then the finalizer or callback has ended; if not, the next interrupt is sent again too


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
