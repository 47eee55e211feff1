"""A backend whose answers a test writes, and a real gateway in front of one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import uvicorn

from deepseek_triton.clients import Chunk, Embedding, GenerateRequest, Generation, Score, ScoreRequest, ServedModel
from deepseek_triton.gateway.app import create_app
from deepseek_triton.gateway.backend.base import Backend, UnknownModelError, UpstreamCall
from deepseek_triton.gateway.backend.routing.member import Server
from deepseek_triton.gateway.protection.server import uvicorn_options
from deepseek_triton.gateway.settings import GatewaySettings
from tests.support.lazy import lazy

if TYPE_CHECKING:
    import openai
else:
    openai = lazy("openai")  # which a gateway in a process of its own doesn't need

MODEL = "fake"
HELLO = (Chunk("Hel", "", 5, 1), Chunk("lo", "", 5, 2), Chunk("", "stop", 5, 3))


class OnlyGenerates:
    """What a fake says to all that its model can't do."""

    async def report(self, model: str, image: bytes, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        raise UnknownModelError(f"the model '{model}' doesn't report")
        yield  # makes it a generator

    async def score(self, model: str, request: ScoreRequest, call: UpstreamCall) -> tuple[Score, ...]:
        raise UnknownModelError(f"the model '{model}' doesn't score")

    async def embed(self, model: str, texts: Sequence[str], call: UpstreamCall) -> tuple[Embedding, ...]:
        raise UnknownModelError(f"the model '{model}' gives no embeddings")

    async def max_seq_len(self, model: str) -> int:
        return 512


@dataclass
class FakeBackend(OnlyGenerates):
    """A `Backend` that gives `chunks` with `pause_s` before each; after them it raises `error`, if there is one.

    requests, calls: what came, if is_remembering. running, ended: requests that run now; those that were cancelled.
    """

    chunks: Sequence[Chunk] = HELLO
    pause_s: float = 0.0
    error: Exception | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    calls: list[UpstreamCall] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0
    is_open: bool = False
    is_remembering: bool = True

    async def open(self) -> None:
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    async def is_ready(self) -> bool:
        return True

    async def models(self) -> tuple[ServedModel, ...]:
        return (ServedModel(MODEL, "generate"),)

    async def check_model(self, name: str) -> None:
        if name != MODEL:
            raise UnknownModelError(f"the model '{name}' does not exist")

    async def generate(self, model: str, request: GenerateRequest, call: UpstreamCall) -> tuple[Generation, ...]:
        return Generation.all_from_chunks([chunk async for chunk in self.stream(model, request, call)])

    async def stream(self, model: str, request: GenerateRequest, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        await self.check_model(model)
        if self.is_remembering:
            self.requests.append(request)
            self.calls.append(call)
        self.running += 1
        try:
            for chunk in self.chunks:
                await asyncio.sleep(self.pause_s)
                yield chunk
            if self.error is not None:
                raise self.error
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


@contextlib.contextmanager
def client_of(backend: Backend) -> Iterator[openai.OpenAI]:
    """OpenAI's client of a gateway in front of `backend`."""
    with gateway(backend) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


class QuickServer(uvicorn.Server):
    """Ends as soon as it is told to and nothing is connected: uvicorn takes a fifth of a second for that."""

    LOOK_S, PAUSE_S = 0.01, 0.1

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(self.LOOK_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        until = time.monotonic() + self.PAUSE_S
        while (self.server_state.connections or self.server_state.tasks) and time.monotonic() < until:
            await asyncio.sleep(self.LOOK_S / 5)
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets)
        else:
            await self.lifespan.shutdown()


@contextlib.contextmanager
def gateway(
    backend: Backend | None = None, servers: Mapping[str, Server] | None = None, **settings: object
) -> Iterator[str]:
    """The address of a gateway that listens on a free port; neither backend nor servers: those of `backend_urls`."""
    used = GatewaySettings(**settings)  # type: ignore[arg-type]
    server = QuickServer(uvicorn.Config(create_app(used, backend, servers), port=0, **uvicorn_options(used)))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the gateway didn't start"
            threading.Event().wait(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
