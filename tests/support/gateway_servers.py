"""Fake servers behind a gateway: each answers, fails, hangs, dies and comes back when a test says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field

from deepseek_triton.clients import (
    Chunk,
    GenerateRequest,
    Generation,
    ServedModel,
    ServerUnavailable,
)
from deepseek_triton.gateway.backend.base import UnknownModelError, UpstreamCall
from tests.support.gateway import HELLO, OnlyGenerates


@dataclass
class FakeServer(OnlyGenerates):
    """A `Server` whose state a test sets while a gateway uses it, from another thread too.

    error: raised instead of an answer; with error_after: after so many chunks. probe_error: raised by probes. is_down:
    nothing answers. is_hanging: it takes requests and probes, and says nothing. requests, running: what came; what runs
    now.
    """

    models_served: tuple[str, ...] = ("r1",)
    chunks: tuple[Chunk, ...] = HELLO
    pause_s: float = 0.0
    error: Exception | None = None
    error_after: int = 0
    probe_error: Exception | None = None
    is_down: bool = False
    is_hanging: bool = False
    requests: list[GenerateRequest] = field(default_factory=list)
    calls: list[UpstreamCall] = field(default_factory=list)
    running: int = 0
    num_broken_off: int = 0
    num_reconnected: int = 0

    def __post_init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], bool] = {}  # → whether its answer has begun

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def is_ready(self) -> bool:
        return not self.is_down

    async def models(self) -> tuple[ServedModel, ...]:
        await self._reach()
        if self.probe_error is not None:
            raise self.probe_error
        return tuple(ServedModel(name, "generate") for name in self.models_served)

    async def check_model(self, name: str) -> None:
        await self._reach()
        if name not in self.models_served:
            raise UnknownModelError(f"the model '{name}' does not exist")

    async def generate(self, model: str, request: GenerateRequest, call: UpstreamCall) -> tuple[Generation, ...]:
        return Generation.all_from_chunks([chunk async for chunk in self.stream(model, request, call)])

    async def stream(self, model: str, request: GenerateRequest, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        if self.is_down:
            raise ServerUnavailable("nothing answers")
        self.requests.append(request)
        self.calls.append(call)
        self.running += 1
        try:
            await self.check_model(model)
            for index, chunk in enumerate(self.chunks):
                if self.error is not None and index == self.error_after:
                    raise self.error
                await asyncio.sleep(self.pause_s)
                await self._reach(is_begun=index > 0)
                yield chunk
        finally:
            self.running -= 1

    def break_off(self, *, only_waiting: bool) -> None:
        """End what hangs, as a connection that breaks."""
        for waiting, is_begun in self._waiting.items():
            if not waiting.done() and not (only_waiting and is_begun):
                self.num_broken_off += 1
                waiting.set_exception(ServerUnavailable("broken off"))

    def reconnect(self) -> None:
        self.num_reconnected += 1

    async def _reach(self, *, is_begun: bool = False) -> None:
        if self.is_down:
            raise ServerUnavailable("nothing answers")
        while self.is_hanging:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[waiting] = is_begun
            try:
                done, _ = await asyncio.wait({waiting}, timeout=0.02)
                if done:
                    waiting.result()
            finally:
                del self._waiting[waiting]
            if self.is_down:
                raise ServerUnavailable("nothing answers")


@contextlib.contextmanager
def down(server: FakeServer) -> Iterator[None]:
    """It is dead meanwhile."""
    server.is_down = True
    try:
        yield
    finally:
        server.is_down = False
