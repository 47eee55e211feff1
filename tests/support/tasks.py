"""Tasks of an asyncio program: what one tells, and whether any is left behind."""

from __future__ import annotations

import asyncio
import time
from typing import Any


async def check_no_tasks(seconds: float = 20.0) -> None:
    """Assert that no other task is left. grpcio's own tasks see a call's end some turns of the loop later."""
    deadline = time.monotonic() + seconds
    while (tasks := asyncio.all_tasks() - {asyncio.current_task()}) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert not tasks


async def told(event: asyncio.Event, task: asyncio.Task[Any]) -> None:
    """Wait until `task` sets the event. One that ends instead would never do so: its error is raised here."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
    if not event.is_set():
        waiting.cancel()
        await task
        raise AssertionError("the task has ended without a word")
