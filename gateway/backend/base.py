"""The interface of a backend: what the APIs ask of whatever computes the answers. A fake of it serves the tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from deepseek_triton.clients import (
    Chunk,
    ClientError,
    Embedding,
    GenerateRequest,
    Generation,
    Score,
    ScoreRequest,
    ServedModel,
)
from deepseek_triton.gateway.record import RouteNotes


class UnknownModelError(Exception):
    """No backend serves a model of this name, or it doesn't do what is asked of it."""


class NoBackendError(ClientError):
    """No server can take a request of this model now: all are down, or their breakers are open.

    retry_after_s: the seconds until one may take requests again.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(ClientError):
    """The gateway sends the request to no server, because those that there are have enough to do."""


@dataclass(frozen=True)
class UpstreamCall:
    """What goes with a request: its id, headers of the call such as `traceparent`, who asks, and notes of its way.

    caller: a key's id or a network address; requests of one caller get the same arm of a route.
    """

    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    caller: str = ""
    notes: RouteNotes = field(default_factory=RouteNotes)


class Backend(Protocol):
    """Answers requests for several models.

    `model` is a served model's name. Every method but `open` and `close` raises `ClientError`; those that take a model
    raise `UnknownModelError`. A request ends on the server as soon as the task that waits for it is cancelled or its
    iterator is closed.
    """

    async def open(self) -> None:
        """Prepare it, in the event loop that serves. A server that isn't there yet is no error."""
        ...

    async def close(self) -> None:
        """Release the connections; requests that are being given up are waited for."""
        ...

    async def is_ready(self) -> bool:
        """Say whether it can answer requests."""
        ...

    async def models(self) -> tuple[ServedModel, ...]:
        """The models that are ready."""
        ...

    async def check_model(self, name: str) -> None:
        """Raise `UnknownModelError` unless a model of this name generates text."""
        ...

    async def generate(self, model: str, request: GenerateRequest, call: UpstreamCall) -> tuple[Generation, ...]:
        """Wait for all answers, in the order of their index."""
        ...

    def stream(self, model: str, request: GenerateRequest, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        """Give the answers as they come; of each sequence, the last chunk has a `finish_reason`."""
        ...

    def report(self, model: str, image: bytes, call: UpstreamCall) -> AsyncGenerator[Chunk, None]:
        """Give the report on an image as it comes; the last chunk has a `finish_reason`."""
        ...

    async def score(self, model: str, request: ScoreRequest, call: UpstreamCall) -> tuple[Score, ...]:
        """Score every text of the request."""
        ...

    async def embed(self, model: str, texts: Sequence[str], call: UpstreamCall) -> tuple[Embedding, ...]:
        """Embed every text."""
        ...

    async def max_seq_len(self, model: str) -> int:
        """The tokens that a prompt and its answer may have together; not for scoring models."""
        ...
