"""ReadAhead: an async generator, read by a task of its own, one item ahead of its consumer.

Cancelling the consumer leaves the generator running: the owner then drains or closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

from deepseek_triton.clients.errors import ClientError

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """Gives the items of `source`, and raises what it raises. It must be drained or closed."""

    def __init__(self, source: AsyncGenerator[Item, None]) -> None:
        self._source = source
        self._items: list[Item] = []  # at most one
        self._error: Exception | None = None
        self._is_discarding = False
        self._is_ended = False
        self.has_begun = False  # an item has come
        self._has_news = asyncio.Event()  # an item, or the end
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._task = asyncio.create_task(self._read())

    def __aiter__(self) -> ReadAhead[Item]:
        return self

    async def __anext__(self) -> Item:
        await self._has_news.wait()
        if self._items:
            if not self._is_ended:
                self._has_news.clear()
            self._has_room.set()
            return self._items.pop()
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def fail(self, error: Exception) -> None:
        """Raise `error` instead of what may still come, at once; its owner closes it then."""
        if not self._is_ended:
            self._items.clear()
            self._error, self._is_ended, self._is_discarding = error, True, True
            self._has_room.set()
            self._has_news.set()

    async def drain(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for the source's end, ignoring what comes, and close it."""
        self._is_discarding = True
        self._has_room.set()
        await asyncio.wait({self._task}, timeout=timeout_s)
        await self.close()

    async def close(self) -> None:
        """Close the source. Nothing of it is raised any more."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _read(self) -> None:
        try:
            async with contextlib.aclosing(self._source) as source:
                async for item in source:
                    await self._has_room.wait()
                    if not self._is_discarding:
                        self.has_begun = True
                        self._items.append(item)
                        self._has_room.clear()
                        self._has_news.set()
        except Exception as error:
            self._error = self._error or error
        except asyncio.CancelledError:
            # Closing the client cancels its calls, and the consumer must be told. After `close` nobody reads this.
            self._error = ClientError("the call was cancelled")
            raise
        finally:
            self._is_ended = True
            self._has_news.set()
