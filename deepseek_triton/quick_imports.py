"""Import many modules without the garbage collector, which finds nothing there: what they make lives to the end."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


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
