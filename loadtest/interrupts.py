"""Ctrl-C and SIGTERM in a process of greenlets: one KeyboardInterrupt, in the main greenlet.

Python's own handler raises it wherever the main thread is: in the greenlet of any user, or in the callback of a weak
reference, which ignores it. This handler raises nothing: gevent's loop throws the exception into the main greenlet.
"""

from __future__ import annotations

import signal
from types import FrameType

import gevent

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def interrupt_main_greenlet() -> None:
    """Take both signals over. A second one is raised at once, wherever the main thread is: it may be stuck."""
    hub, is_asked = gevent.get_hub(), False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        if is_asked:
            signal.default_int_handler(number, frame)
        is_asked = True
        hub.loop.run_callback_threadsafe(hub.parent.throw, KeyboardInterrupt)

    for number in SIGNALS:
        signal.signal(number, handle)
