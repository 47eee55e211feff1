"""An asyncio client behind the synchronous interface, so that the tests of the synchronous clients hold for it too."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, TypeVar

from deepseek_triton.clients.api import Chunk, GenerateRequest, Generation
from deepseek_triton.clients.async_base import AsyncBaseClient
from deepseek_triton.clients.score import Score, ScoreRequest

Result = TypeVar("Result")


class Blocking:
    """Runs an asyncio client on an event loop in a thread of its own.

    As in `asyncio.run`, an interrupted wait cancels the task and waits for its end.
    """

    def __init__(self, client: AsyncBaseClient) -> None:
        self.wrapped = client
        self.model = client.model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def generate(self, request: GenerateRequest, *, request_id: str | None = None) -> Generation:
        return self._run(self.wrapped.generate(request, request_id=request_id))

    def generate_all(self, request: GenerateRequest, *, request_id: str | None = None) -> tuple[Generation, ...]:
        return self._run(self.wrapped.generate_all(request, request_id=request_id))

    def stream(self, request: GenerateRequest, *, request_id: str | None = None) -> Generator[Chunk, None, None]:
        return self._stream(self.wrapped.stream(request, request_id=request_id))

    def stop(self, request_id: str) -> None:
        self._run(self.wrapped.stop(request_id))

    def score(self, request: ScoreRequest) -> tuple[Score, ...]:
        return self._run(self.wrapped.score(request))

    def infer(self, *arguments: Any) -> Any:
        return self._run(self.wrapped.infer(*arguments))

    def is_ready(self, model: str | None = None) -> bool:
        return self._run(self.wrapped.is_ready(model))

    def max_seq_len(self) -> int:
        return self._run(self.wrapped.max_seq_len())

    def close(self) -> None:
        self._run(self.wrapped.close())

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def end(self) -> None:
        """End the loop and check that the client has left no task on it."""
        self.close()
        # What gRPC cancelled ends a moment after `close`, which doesn't wait for it.
        left = self._run(_lasting_tasks())
        self._run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert not left, left

    def _stream(self, chunks: AsyncGenerator[Chunk, None]) -> Generator[Chunk, None, None]:
        try:
            while True:
                try:
                    yield self._run(_next(chunks))
                except StopAsyncIteration:
                    return
        finally:
            self._run(chunks.aclose())

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(_as_result(work), self._loop)
        try:
            outcome = future.result()
        except KeyboardInterrupt:
            future.cancel()
            self._settle()
            raise
        if isinstance(outcome, _Raised):
            raise outcome.error
        return outcome

    def _settle(self) -> None:
        """Wait until the cancelled task has ended."""
        tasks = asyncio.run_coroutine_threadsafe(_other_tasks(), self._loop).result()
        waiting = asyncio.run_coroutine_threadsafe(_wait(tasks), self._loop)
        concurrent.futures.wait([waiting], timeout=5)


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


async def _as_result(work: Coroutine[Any, Any, Result]) -> Result | _Raised:
    """A future can't hold StopAsyncIteration, so errors travel as values."""
    try:
        return await work
    except Exception as error:
        return _Raised(error)


async def _next(chunks: AsyncGenerator[Chunk, None]) -> Chunk:
    return await anext(chunks)


async def _other_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def _lasting_tasks() -> set[asyncio.Task[Any]]:
    """Tasks that don't end of themselves within a few seconds."""
    tasks = await _other_tasks()
    return (await asyncio.wait(tasks, timeout=5))[1] if tasks else tasks


async def _wait(tasks: set[asyncio.Task[Any]]) -> None:
    if tasks:
        await asyncio.wait(tasks)
