"""Waiting for a state, however long a busy machine takes to reach it."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 30.0


def until(holds: Callable[[], object], limit_s: float = LIMIT_S, every_s: float = 0.01) -> None:
    """Wait until `holds()` is true, asked every so many seconds.

    The limit is no promise of the product: it ends a test that would hang.
    """
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"it didn't come within {limit_s:g} s"
        time.sleep(every_s)
