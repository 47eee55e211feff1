"""TritonBackend: one tritonserver behind the gateway, over gRPC, one stream for each request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from uuid import uuid4

from deepseek_triton.clients import (
    AsyncCatalogue,
    AsyncGrpcClient,
    Chunk,
    ClientError,
    Embedding,
    GenerateRequest,
    Generation,
    RequestRejected,
    Score,
    ScoreRequest,
    ServedModel,
)
from deepseek_triton.clients.life import READY_TIMEOUT_S
from deepseek_triton.clients.report import report_engine, report_inputs
from deepseek_triton.gateway.backend.base import UnknownModelError, UpstreamCall

ADMIN_KEY = "TRITON_ADMIN_KEY"  # the environment variable of the key with which a server's index is read
# A name that is asked for and isn't known makes the gateway look again, this many seconds after the last look at most.
LOOK_AGAIN_S = 1.0
RETIRE_LOOK_S = 0.5  # whether an old connection is still used


class TritonBackend:
    """A `Backend`. names: the models to serve; empty: all in the server's index. timeout_s: of a whole request."""

    def __init__(self, url: str, names: tuple[str, ...], timeout_s: float) -> None:
        self._catalogue = self._new_catalogue(url)
        self._names = names
        self._timeout_s = timeout_s
        self._models: dict[str, ServedModel] = {}
        self._clients: dict[str, AsyncGrpcClient] = {}
        self._retired: dict[AsyncCatalogue | AsyncGrpcClient, asyncio.Task[None]] = {}  # old connections still used
        self._running: set[str] = set()  # ids of requests
        self._looked_at = -LOOK_AGAIN_S

    @staticmethod
    def _new_catalogue(url: str) -> AsyncCatalogue:
        return AsyncCatalogue(url, os.environ.get(ADMIN_KEY, ""))

    async def open(self) -> None:
        """Connections are opened when they are needed."""

    async def close(self) -> None:
        """Release the connections; requests that are being given up are waited for."""
        for task in self._retired.values():
            task.cancel()
        await asyncio.gather(*self._retired.values(), return_exceptions=True)
        for each in (*self._clients.values(), *self._retired, self._catalogue):
            await each.close()

    async def is_ready(self) -> bool:
        """Say whether the server lives and every model that is to be served is there."""
        try:
            models = await self.models()
        except ClientError:
            return False
        return bool(models) and {model.name for model in models} >= set(self._names)

    async def models(self) -> tuple[ServedModel, ...]:
        """The models that are ready."""
        await self._look()
        return tuple(self._models.values())

    async def check_model(self, name: str) -> None:
        """Raise `UnknownModelError` unless a model of this name generates text."""
        await self._client(name, "generate")

    async def generate(self, model: str, request: GenerateRequest, call: UpstreamCall) -> tuple[Generation, ...]:
        """Wait for all answers, in the order of their index."""
        client = await self._client(model, "generate")
        with self._own_id(call) as request_id:
            return await client.generate_all(request, request_id=request_id, headers=call.headers)

    async def stream(self, model: str, request: GenerateRequest, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        """Give the answers as they come; of each sequence, the last chunk has a `finish_reason`."""
        client = await self._client(model, "generate")
        with self._own_id(call) as request_id:
            stream = client.stream(request, request_id=request_id, headers=call.headers)
            async with contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def report(self, model: str, image: bytes, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        """Give the report on an image as it comes; the last chunk has a `finish_reason`."""
        client = await self._client(model, "report")
        with self._own_id(call) as request_id:
            stream = client.stream_tensors(report_inputs(image), request_id=request_id, headers=call.headers)
            async with contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def score(self, model: str, request: ScoreRequest, call: UpstreamCall) -> tuple[Score, ...]:
        """Score every text of the request."""
        client = await self._client(model, "score")
        return await client.score(request)

    async def embed(self, model: str, texts: Sequence[str], call: UpstreamCall) -> tuple[Embedding, ...]:
        """Embed every text."""
        client = await self._client(model, "score")
        if not self._models[model].embeds:
            raise UnknownModelError(f"the model '{model}' gives no embeddings: build it with --embeddings")
        return await client.embed(texts)

    async def max_seq_len(self, model: str) -> int:
        """The tokens that a prompt and its answer may have together; not for scoring models."""
        client = await self._client(model, "generate")
        return await client.max_seq_len()  # not kept: the model may be loaded again with another context

    def break_off(self, *, only_waiting: bool) -> None:
        """End what runs with `ServerUnavailable`; only_waiting: what no part of an answer has come for yet."""
        for client in (*self._clients.values(), *self._retired):
            if isinstance(client, AsyncGrpcClient):
                client.break_off(only_waiting=only_waiting)

    def reconnect(self) -> None:
        """Send new requests over new connections, for which the address is resolved again."""
        old: list[AsyncCatalogue | AsyncGrpcClient] = [self._catalogue, *self._clients.values()]
        self._catalogue, self._clients = self._new_catalogue(self._catalogue.url), {}
        for each in old:
            self._retired[each] = asyncio.create_task(self._retire(each))

    async def _retire(self, old: AsyncCatalogue | AsyncGrpcClient) -> None:
        """Close what isn't used for new requests any more, when its last one has ended."""
        await asyncio.sleep(READY_TIMEOUT_S)  # the longest question to a catalogue
        while isinstance(old, AsyncGrpcClient) and old.num_running:
            await asyncio.sleep(RETIRE_LOOK_S)
        await old.close()
        del self._retired[old]

    @contextlib.contextmanager
    def _own_id(self, call: UpstreamCall) -> Iterator[str]:
        """The call's id, changed if another running request has it: a request is stopped by its id."""
        request_id = call.request_id if call.request_id not in self._running else f"{call.request_id}-{uuid4().hex}"
        self._running.add(request_id)
        try:
            yield request_id
        finally:
            self._running.discard(request_id)

    async def _client(self, name: str, task: str) -> AsyncGrpcClient:
        if name not in self._models:
            await self._look_for(name)
        model = self._models[name]
        if model.task != task:
            raise UnknownModelError(f"the model '{name}' doesn't {task}: it was built with task {model.task}")
        if name not in self._clients:
            self._clients[name] = AsyncGrpcClient(self._catalogue.url, name, self._timeout_s)
            if task == "report":
                self._clients[name].engine = report_engine(name)
        return self._clients[name]

    async def _look_for(self, name: str) -> None:
        if time.monotonic() - self._looked_at >= LOOK_AGAIN_S:
            await self._look()
        if name not in self._models:
            raise UnknownModelError(f"the model '{name}' does not exist")

    async def _look(self) -> None:
        """Ask the server which models are there. Raises `ClientError`."""
        try:
            names = self._names or await self._catalogue.names()
        except RequestRejected as error:
            raise ClientError(f"the server doesn't name its models ({error}); name them with --model") from error
        models = await self._catalogue.models(names)
        self._models = {model.name: model for model in models}
        self._looked_at = time.monotonic()
