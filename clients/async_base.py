"""AsyncBaseClient: what the asyncio clients have in common. A transport only exchanges one request for its responses.

`life.py` decides when an answer is complete and whether the server must be told; this module waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S, Chunk, GenerateRequest, Generation
from deepseek_triton.clients.errors import ClientError, ServerUnavailable
from deepseek_triton.clients.life import (
    STOP_TIMEOUT_S,
    ClientCore,
    RequestLife,
    Response,
    StreamCall,
    TensorCall,
    check_single,
    own_id,
    read_build,
    read_max_seq_len,
    whole_answers,
)
from deepseek_triton.clients.read_ahead import ReadAhead
from deepseek_triton.clients.request import Value
from deepseek_triton.clients.score import Embedding, Score, ScoreRequest, Tensor
from deepseek_triton.ensemble.protocol.contract import TensorSpec

Self = TypeVar("Self", bound="AsyncBaseClient")

_logger = logging.getLogger(__name__)


class AsyncBaseClient(ClientCore, ABC):
    """A `clients.api.AsyncClient` but for its transport. Tasks of one event loop may share one client."""

    def __init__(self, url: str, model: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(url, model, timeout_s)
        self._stopping: set[asyncio.Task[None]] = set()  # of requests that are being given up
        self._reading: set[ReadAhead[Response]] = set()  # of running requests
        self._asking: set[asyncio.Future[dict[str, Tensor]]] = set()

    async def generate(self, request: GenerateRequest, *, request_id: str | None = None) -> Generation:
        """Wait for the whole answer. Raises `ClientError`; `ValueError` for a request of several answers."""
        check_single(request)
        (generation,) = await self.generate_all(request, request_id=request_id)
        return generation

    async def generate_all(
        self, request: GenerateRequest, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[Generation, ...]:
        """Wait for all `num_return_sequences` answers, in the order of their index. Raises `ClientError`.

        headers: of the call, as `traceparent`; names in lower case.
        """
        life = self._begin(request, own_id(request_id), stream=False, headers=headers)
        async with contextlib.aclosing(self._responses(life)) as responses:
            return whole_answers([chunks async for chunks in responses])

    def stream(
        self, request: GenerateRequest, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Give the answer as it comes; of each sequence, the last chunk has a `finish_reason`. Raises `ClientError`.

        The request goes out with the first `anext()`. Closing the iterator early, or cancelling the task that reads
        it, stops the request on the server too, which takes as long as the server's acknowledgement (at most
        `STOP_TIMEOUT_S`). Use `contextlib.aclosing` where a loop may be left: asyncio closes an abandoned iterator
        only after it has been collected. headers: of the call, as `traceparent`; names in lower case.
        """
        return self._stream(request, own_id(request_id), headers)

    def stream_tensors(
        self,
        inputs: Mapping[TensorSpec, Value],
        *,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """As `stream`, of an ensemble that has other inputs than a prompt and ends in a text; over gRPC alone."""
        return self._stream_life(lambda: self._begin_tensors(inputs, own_id(request_id), headers=headers))

    async def stop(self, request_id: str) -> None:
        """End a running request: its answer ends with the finish_reason "cancelled".

        It is one of this client's own, or has a random id such as a request without `request_id` gets.

        Returns once the server has acknowledged it; nothing happens where no such request runs. Raises
        `ClientError`, after at most `STOP_TIMEOUT_S`.
        """
        async with contextlib.aclosing(self._exchange(self._stop_call(request_id))) as responses:
            async for _ in responses:
                pass

    async def score(self, request: ScoreRequest) -> tuple[Score, ...]:
        """Score every text of the request; for models built with task score. Raises `ClientError`."""
        return Score.from_tensors(await self._breakable(self._score_call(request)))

    async def embed(self, texts: str | Sequence[str]) -> tuple[Embedding, ...]:
        """Embed every text; for models built with task score and --embeddings. Raises `ClientError`, `ValueError`."""
        return Embedding.from_tensors(await self._breakable(self._embed_call(texts)))

    async def infer(
        self, model: str, inputs: Mapping[TensorSpec, Tensor], outputs: tuple[TensorSpec, ...]
    ) -> dict[str, Tensor]:
        """Send whole tensors to `model`, which isn't decoupled, and read its one response. Raises `ClientError`."""
        return await self._infer(self._tensor_call(model, inputs, outputs))

    async def is_ready(self, model: str | None = None) -> bool:
        """Say whether `model` (None: the client's own) can be called; False too if nothing answers."""
        timeout_s = self._ready_timeout_s
        try:
            return await self._is_model_ready(model or self.model, timeout_s)
        except ClientError:
            return False

    async def max_seq_len(self) -> int:
        """Ask for the tokens that a prompt and its answer may have together; not for scoring. Raises `ClientError`."""
        async with contextlib.aclosing(self._exchange(self._describe_call())) as responses:
            return read_max_seq_len([response async for response in responses])

    async def build_identity(self) -> str:
        """Ask which build of the model is loaded: its `Manifest.identity`, empty if unknown. Raises `ClientError`."""
        return read_build(await self._infer(self._build_call()))

    @property
    def num_running(self) -> int:
        """The requests for answers that run now."""
        return len(self._reading) + len(self._asking)

    def break_off(self, *, only_waiting: bool = False) -> None:
        """End running requests for answers with `ServerUnavailable`, as a broken connection would.

        It is for a server that says nothing any more, which can't be told to stop. only_waiting: those of which no
        response has come.
        """
        for responses in self._reading:
            if not (only_waiting and responses.has_begun):
                responses.fail(self._silence())
        while self._asking:
            self._asking.pop().cancel()

    async def _breakable(self, call: TensorCall) -> dict[str, Tensor]:
        """`_infer`, which `break_off` ends."""
        asking = asyncio.ensure_future(self._infer(call))
        self._asking.add(asking)
        try:
            return await asking
        except asyncio.CancelledError:
            if asking not in self._asking:  # `break_off` has cancelled it
                raise self._silence() from None
            raise
        finally:
            self._asking.discard(asking)

    def _silence(self) -> ServerUnavailable:
        return ServerUnavailable(f"the server at {self.url} doesn't answer any more")

    async def close(self) -> None:
        """Release the connections. Close the streams first: none is stopped on the server any more.

        Requests whose stopping has begun are waited for.
        """
        self._is_closed = True
        await asyncio.gather(*self._stopping, return_exceptions=True)
        await self._close_transport()

    async def __aenter__(self: Self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _stream(
        self, request: GenerateRequest, request_id: str, headers: Mapping[str, str] | None
    ) -> AsyncGenerator[Chunk, None]:
        return self._stream_life(lambda: self._begin(request, request_id, stream=True, headers=headers))

    async def _stream_life(self, begin: Callable[[], RequestLife]) -> AsyncGenerator[Chunk, None]:
        async with contextlib.aclosing(self._responses(begin())) as responses:
            async for chunks in responses:
                for chunk in chunks:
                    yield chunk

    async def _responses(self, life: RequestLife) -> AsyncGenerator[list[Chunk], None]:
        """Give each response's chunks, up to the last sequence's end."""
        # A task of its own reads the call, for cancelling a read would end the call before the engine is told.
        responses = ReadAhead(self._exchange(life.call))
        self._reading.add(responses)
        try:
            async for response in responses:
                yield life.read(response)
            life.end()
        except BaseException as error:
            life.fail(error)
            raise
        finally:
            self._reading.discard(responses)
            # `BaseClient._responses` says why the engine is told. A second cancellation doesn't interrupt it.
            if life.is_over or self._is_closed:
                await responses.close()
            else:
                stopping = asyncio.create_task(self._give_up(life.call.request_id, responses))
                self._stopping.add(stopping)
                stopping.add_done_callback(self._stopping.discard)
                await asyncio.shield(stopping)

    async def _give_up(self, request_id: str, responses: ReadAhead[Response]) -> None:
        """Stop the request on the server, and wait for its last response."""
        try:
            await self.stop(request_id)
        except ClientError as error:
            # Raising would hide why the request was given up.
            _logger.warning("request %s may still run: stopping it failed: %s", request_id, error)
        finally:
            await responses.drain(STOP_TIMEOUT_S)

    @abstractmethod
    def _exchange(self, call: StreamCall) -> AsyncGenerator[Response, None]:
        """Send one request and give each response's `outputs`, those that it has, until the server ends it.

        Closing the generator cancels the call locally. Raises `ClientError`.
        """

    @abstractmethod
    async def _infer(self, call: TensorCall) -> dict[str, Tensor]:
        """Send one request and wait for its one response; of it, the `outputs` that it has. Raises `ClientError`."""

    @abstractmethod
    async def _is_model_ready(self, model: str, timeout_s: float) -> bool:
        """Ask the server about one model. Raises `ClientError`."""

    @abstractmethod
    async def _close_transport(self) -> None:
        """Release the connections."""
