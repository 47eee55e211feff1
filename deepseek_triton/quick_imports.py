"""A program's start and end without the garbage collector, which finds nothing there: what imports make lives on."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator

# Python's own (700, 10, 10) looks at young objects thirty times as often, most of all while modules are imported.
THRESHOLDS = (20_000, 10, 10)


def collect_rarely() -> None:
    """Let the collector of a command's process look less often, and at nothing when the process ends."""
    gc.set_threshold(*THRESHOLDS)
    atexit.register(gc.freeze)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Pause the collector during a program's imports, and let it pass over what they made, at the program's end too.

    Nothing changes in a process that has done so before, or that has no collector.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
