"""BaseClient: what the synchronous clients have in common. A transport only exchanges one request for its responses.

`life.py` decides when an answer is complete and whether the server must be told; this module waits.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from types import TracebackType
from typing import TypeVar

from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S, Chunk, GenerateRequest, Generation
from deepseek_triton.clients.errors import ClientError
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
from deepseek_triton.clients.request import Value
from deepseek_triton.clients.score import Embedding, Score, ScoreRequest, Tensor
from deepseek_triton.ensemble.protocol.contract import TensorSpec

Self = TypeVar("Self", bound="BaseClient")

_logger = logging.getLogger(__name__)


class BaseClient(ClientCore, ABC):
    """A `clients.api.Client` but for its transport."""

    def __init__(self, url: str, model: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(url, model, timeout_s)

    def generate(self, request: GenerateRequest, *, request_id: str | None = None) -> Generation:
        """Wait for the whole answer. Raises `ClientError`; `ValueError` for a request of several answers."""
        check_single(request)
        (generation,) = self.generate_all(request, request_id=request_id)
        return generation

    def generate_all(self, request: GenerateRequest, *, request_id: str | None = None) -> tuple[Generation, ...]:
        """Wait for all `num_return_sequences` answers, in the order of their index. Raises `ClientError`."""
        return whole_answers(list(self._responses(self._begin(request, own_id(request_id), stream=False))))

    def stream(self, request: GenerateRequest, *, request_id: str | None = None) -> Generator[Chunk, None, None]:
        """Give the answer as it comes; of each sequence, the last chunk has a `finish_reason`. Raises `ClientError`.

        The request goes out with the first `next()`. Closing the iterator early stops the request on the
        server too, which takes as long as the server's acknowledgement (at most `STOP_TIMEOUT_S`).
        """
        return self._stream(request, own_id(request_id))

    def stream_tensors(
        self, inputs: Mapping[TensorSpec, Value], *, request_id: str | None = None
    ) -> Generator[Chunk, None, None]:
        """As `stream`, of an ensemble that has other inputs than a prompt and ends in a text; over gRPC alone."""
        return self._stream_life(lambda: self._begin_tensors(inputs, own_id(request_id)))

    def stop(self, request_id: str) -> None:
        """End a running request: its answer ends with the finish_reason "cancelled".

        It is one of this client's own, or has a random id such as a request without `request_id` gets.

        Returns once the server has acknowledged it; nothing happens where no such request runs. Raises
        `ClientError`, after at most `STOP_TIMEOUT_S`.
        """
        for _ in self._exchange(self._stop_call(request_id)):
            pass

    def score(self, request: ScoreRequest) -> tuple[Score, ...]:
        """Score every text of the request; for models built with task score. Raises `ClientError`."""
        return Score.from_tensors(self._infer(self._score_call(request)))

    def embed(self, texts: str | Sequence[str]) -> tuple[Embedding, ...]:
        """Embed every text; for models built with task score and --embeddings. Raises `ClientError`, `ValueError`."""
        return Embedding.from_tensors(self._infer(self._embed_call(texts)))

    def infer(
        self, model: str, inputs: Mapping[TensorSpec, Tensor], outputs: tuple[TensorSpec, ...]
    ) -> dict[str, Tensor]:
        """Send whole tensors to `model`, which isn't decoupled, and read its one response. Raises `ClientError`."""
        return self._infer(self._tensor_call(model, inputs, outputs))

    def is_ready(self, model: str | None = None) -> bool:
        """Say whether `model` (None: the client's own) can be called; False too if nothing answers."""
        timeout_s = self._ready_timeout_s
        try:
            return self._is_model_ready(model or self.model, timeout_s)
        except ClientError:
            return False

    def max_seq_len(self) -> int:
        """Ask for the tokens that a prompt and its answer may have together; not for scoring. Raises `ClientError`."""
        return read_max_seq_len(list(self._exchange(self._describe_call())))

    def build_identity(self) -> str:
        """Ask which build of the model is loaded: its `Manifest.identity`, empty if unknown. Raises `ClientError`."""
        return read_build(self._infer(self._build_call()))

    def close(self) -> None:
        """Release the connections. Close the streams first: none is stopped on the server any more."""
        self._is_closed = True
        self._close_transport()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, request: GenerateRequest, request_id: str) -> Generator[Chunk, None, None]:
        return self._stream_life(lambda: self._begin(request, request_id, stream=True))

    def _stream_life(self, begin: Callable[[], RequestLife]) -> Generator[Chunk, None, None]:
        with contextlib.closing(self._responses(begin())) as responses:
            for chunks in responses:
                yield from chunks

    def _responses(self, life: RequestLife) -> Generator[list[Chunk], None, None]:
        """Give each response's chunks, up to the last sequence's end."""
        responses = self._exchange(life.call)
        try:
            for response in responses:
                yield life.read(response)
            life.end()
        except BaseException as error:
            life.fail(error)
            raise
        finally:
            # An early close, Ctrl-C, a timeout and a broken answer all end here. Cancelling the call doesn't reach an
            # engine inside an ensemble, so the engine is told, and its last response is waited for: Triton 2.51 never
            # forgets an ensemble request whose caller hung up before that.
            if life.is_over or self._is_closed:
                responses.close()
            else:
                self._give_up(life.call.request_id)
                _drain(responses)

    def _give_up(self, request_id: str) -> None:
        try:
            self.stop(request_id)
        except ClientError as error:
            # Raising would hide why the request was given up.
            _logger.warning("request %s may still run: stopping it failed: %s", request_id, error)

    @abstractmethod
    def _exchange(self, call: StreamCall) -> Generator[Response, None, None]:
        """Send one request and give each response's `outputs`, those that it has, until the server ends it.

        Closing the generator cancels the call locally. Raises `ClientError`.
        """

    @abstractmethod
    def _infer(self, call: TensorCall) -> dict[str, Tensor]:
        """Send one request and wait for its one response; of it, the `outputs` that it has. Raises `ClientError`."""

    @abstractmethod
    def _is_model_ready(self, model: str, timeout_s: float) -> bool:
        """Ask the server about one model. Raises `ClientError`."""

    @abstractmethod
    def _close_transport(self) -> None:
        """Release the connections."""


def _drain(responses: Generator[Response, None, None]) -> None:
    """Read the responses that are still on their way, for at most `STOP_TIMEOUT_S`, and close the call."""

    def read() -> None:
        # The request is given up: no error of it, a closed client included, matters to anybody.
        with contextlib.suppress(Exception), contextlib.closing(responses):
            for _ in responses:
                pass

    # A thread, since a read can't be interrupted: one that outlasts the wait ends with the request's timeout.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(STOP_TIMEOUT_S)
