"""The interface of every client, and all the names that a caller needs.

Clients never import builders: the one thing they share with the rest of the project is `ensemble.protocol.contract`.
This file knows neither gRPC nor HTTP.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from deepseek_triton.clients.generation import Generation
from deepseek_triton.clients.messages import Message
from deepseek_triton.clients.request import GenerateRequest
from deepseek_triton.clients.response import Chunk, Times, ToolCall, TopLogProb

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "Chunk",
    "Client",
    "GenerateRequest",
    "Generation",
    "Message",
    "Times",
    "ToolCall",
    "TopLogProb",
]

DEFAULT_TIMEOUT_S = 300.0


class Client(Protocol):
    """The interface of `GrpcClient` and `HttpClient`, and of their fakes.

    `request_id` None: one that nobody else has. Who gives one can stop the request by it; it should be as unique.
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

    def is_ready(self, model: str | None = None) -> bool:
        """Say whether `model` (None: the client's own) can be called; False too if nothing answers."""
        ...

    def close(self) -> None:
        """Release the connections."""
        ...
