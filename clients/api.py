"""The interfaces of the clients, `Client` and `AsyncClient`, and the types that they take and give.

It knows neither gRPC nor HTTP. Of the rest of the project, clients import nothing but the tensors and the request
options in `ensemble.protocol`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Protocol

from deepseek_triton.clients.generation import Generation
from deepseek_triton.clients.messages import Message
from deepseek_triton.clients.request import GenerateRequest
from deepseek_triton.clients.response import Chunk, Times, ToolCall, TopLogProb
from deepseek_triton.clients.score import Embedding, Score, ScoreRequest

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "AsyncClient",
    "Chunk",
    "Client",
    "Embedding",
    "GenerateRequest",
    "Generation",
    "Message",
    "Score",
    "ScoreRequest",
    "Times",
    "ToolCall",
    "TopLogProb",
]

DEFAULT_TIMEOUT_S = 300.0


class Client(Protocol):
    """The interface of `GrpcClient` and `HttpClient`, and of their fakes.

    `request_id` None: a unique one. A caller that gives one can stop the request by it; it must be unique too.
    """

    def generate(self, request: GenerateRequest, *, request_id: str | None = None) -> Generation:
        """Wait for the whole answer. Raises `ClientError`; `ValueError` for a request of several answers."""
        ...

    def generate_all(self, request: GenerateRequest, *, request_id: str | None = None) -> tuple[Generation, ...]:
        """Wait for all `num_return_sequences` answers, in the order of their index. Raises `ClientError`."""
        ...

    def stream(self, request: GenerateRequest, *, request_id: str | None = None) -> Generator[Chunk, None, None]:
        """Give the answer as it comes; of each sequence, the last chunk has a `finish_reason`. Raises `ClientError`.

        The request goes out with the first `next()`. Closing the iterator early stops the request on the
        server too: wrap it in `contextlib.closing` where a loop may be left.
        """
        ...

    def stop(self, request_id: str) -> None:
        """End a running request of any client: its answer ends with the finish_reason "cancelled".

        Returns once the server has acknowledged it; nothing happens where no such request runs. Raises `ClientError`.
        """
        ...

    def score(self, request: ScoreRequest) -> tuple[Score, ...]:
        """Score every text of the request; for models built with task score. Raises `ClientError`."""
        ...

    def embed(self, texts: str | Sequence[str]) -> tuple[Embedding, ...]:
        """Embed every text; for models built with task score and --embeddings. Raises `ClientError`, `ValueError`."""
        ...

    def is_ready(self, model: str | None = None) -> bool:
        """Say whether `model` (None: the client's own) can be called; False too if nothing answers."""
        ...

    def max_seq_len(self) -> int:
        """Ask for the tokens that a prompt and its answer may have together; not for scoring. Raises `ClientError`."""
        ...

    def close(self) -> None:
        """Release the connections."""
        ...


class AsyncClient(Protocol):
    """The interface of `AsyncGrpcClient` and `AsyncHttpClient`: that of `Client`, for asyncio."""

    async def generate(self, request: GenerateRequest, *, request_id: str | None = None) -> Generation:
        """Wait for the whole answer. Raises `ClientError`; `ValueError` for a request of several answers."""
        ...

    async def generate_all(
        self, request: GenerateRequest, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[Generation, ...]:
        """Wait for all `num_return_sequences` answers, in the order of their index. Raises `ClientError`."""
        ...

    def stream(
        self, request: GenerateRequest, *, request_id: str | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Give the answer as it comes; of each sequence, the last chunk has a `finish_reason`. Raises `ClientError`.

        The request goes out with the first `anext()`. Closing the iterator early, or cancelling the task that reads
        it, stops the request on the server too: wrap it in `contextlib.aclosing` where a loop may be left.
        """
        ...

    async def stop(self, request_id: str) -> None:
        """End a running request of any client: its answer ends with the finish_reason "cancelled".

        Returns once the server has acknowledged it; nothing happens where no such request runs. Raises `ClientError`.
        """
        ...

    async def score(self, request: ScoreRequest) -> tuple[Score, ...]:
        """Score every text of the request; for models built with task score. Raises `ClientError`."""
        ...

    async def embed(self, texts: str | Sequence[str]) -> tuple[Embedding, ...]:
        """Embed every text; for models built with task score and --embeddings. Raises `ClientError`, `ValueError`."""
        ...

    async def is_ready(self, model: str | None = None) -> bool:
        """Say whether `model` (None: the client's own) can be called; False too if nothing answers."""
        ...

    async def max_seq_len(self) -> int:
        """Ask for the tokens that a prompt and its answer may have together; not for scoring. Raises `ClientError`."""
        ...

    async def close(self) -> None:
        """Release the connections."""
        ...
