"""The end of tasks that call Redis: a call of its client that ends just when the task is cancelled can swallow that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

AGAIN_S = 1.0


async def end_tasks(tasks: Iterable[asyncio.Task[Any]], again_s: float = AGAIN_S) -> None:
    """Cancel tasks, again every `again_s` seconds, and wait until all have ended; their errors are dropped."""
    all_tasks = tuple(tasks)
    pending = {task for task in all_tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=again_s)
    for task in all_tasks:
        if not task.cancelled():
            task.exception()
