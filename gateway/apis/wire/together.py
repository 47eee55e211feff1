"""Several requests to the backend for one HTTP request: if one fails, all are ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


async def gather_all(works: Sequence[Coroutine[Any, Any, Item]]) -> list[Item]:
    """The results, in the order of `works`. Raises the first error, after the others have been cancelled."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task in done and task.exception() is not None:
                await task
        return [await task for task in tasks]
    finally:
        await _end(tasks)


async def merge(sources: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """The items of all sources as they come, each with its source's index. Raises the first error; all are closed."""
    items: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue()
    room = asyncio.Semaphore(len(sources))

    async def read(index: int, source: AsyncGenerator[Item, None]) -> None:
        try:
            async with contextlib.aclosing(source):
                async for item in source:
                    await room.acquire()
                    items.put_nowait((index, item))
        except Exception as error:
            items.put_nowait(error)
        else:
            items.put_nowait(None)

    tasks = [asyncio.create_task(read(index, source)) for index, source in enumerate(sources)]
    try:
        num_running = len(tasks)
        while num_running:
            item = await items.get()
            if item is None:
                num_running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                room.release()
                yield item
    finally:
        await _end(tasks)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
