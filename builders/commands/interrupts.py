"""What a long command says when Ctrl-C or SIGTERM ends it: what it leaves, and how to go on."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def interruptible(what_stays: Callable[[], str]) -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does, so that nothing temporary stays, and say what an interrupt leaves."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if is_main else None
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: {what_stays()}", file=sys.stderr, flush=True)
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
