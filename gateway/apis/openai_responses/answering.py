"""Answering: one response that is computed, whole, as a stream or in the background."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from deepseek_triton.clients import Chunk
from deepseek_triton.gateway.apis.openai_responses.store import ResponseStore, StoredResponse
from deepseek_triton.gateway.apis.openai_responses.writer import ResponseWriter
from deepseek_triton.gateway.apis.wire import sse
from deepseek_triton.gateway.apis.wire.errors import ApiError, as_api_error
from deepseek_triton.gateway.record import RequestRecord


class Answering:
    """An `EventSource`. stored: what `store` keeps when the response is complete, if it is to be kept."""

    def __init__(
        self, writer: ResponseWriter, chunks: AsyncGenerator[Chunk, None], stored: StoredResponse, store: ResponseStore
    ) -> None:
        self._writer = writer
        self._chunks = chunks
        self._stored = stored
        self._store = store

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Give the events; the response is kept when it is complete."""
        async with contextlib.aclosing(self._chunks) as chunks:
            is_begun = False
            async for chunk in chunks:
                # What the server refuses before the first token is told by the status.
                events = [] if is_begun else self._writer.begin()
                is_begun = True
                events += self._writer.push(chunk)
                if chunk.finish_reason:
                    self._keep()
                for event in events:
                    yield sse.event(event, event["type"])

    def failure(self, error: ApiError) -> bytes:
        """The event that ends the stream; the failed response is kept too."""
        events = self._writer.fail(error)
        self._keep()
        return b"".join(sse.event(event, event["type"]) for event in events)

    async def whole(self) -> dict[str, Any]:
        """Wait for the complete response."""
        async for _ in self.events():
            pass
        return self._writer.response

    async def run(self, record: RequestRecord) -> None:
        """Compute the response in the background, whatever becomes of it."""
        try:
            await self.whole()
        except asyncio.CancelledError:
            self._writer.cancel()
            raise
        except Exception as error:
            self._writer.fail(as_api_error(error))
        finally:
            if record.settle is not None:
                record.settle()

    def _keep(self) -> None:
        if self._writer.response["store"]:
            self._store.put(self._stored)
