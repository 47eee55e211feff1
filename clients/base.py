"""The life of one request, the same for every transport: send, read to the end, stop what is given up.

A transport knows how to exchange one request for its responses; this file knows request ids, when an answer
is complete, and that the server must be told when nobody waits for it any more.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import TypeVar

from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S, Chunk, GenerateRequest, Generation
from deepseek_triton.clients.checks import check_text
from deepseek_triton.clients.errors import ClientError, ProtocolError, RequestRejected, ServerUnavailable
from deepseek_triton.clients.request import Scalar
from deepseek_triton.clients.response import ChunkReader
from deepseek_triton.clients.score import Score, ScoreRequest, Tensor
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec

# The longest wait for the engine to acknowledge a stop request, in seconds.
STOP_TIMEOUT_S = 2.0
# The longest wait for a readiness probe, in seconds.
READY_TIMEOUT_S = 5.0

Self = TypeVar("Self", bound="BaseClient")

_logger = logging.getLogger(__name__)


class BaseClient(ABC):
    """A `clients.api.Client` but for its transport.

    `model` is the served ensemble; `timeout_s` bounds a whole request, from its sending to its last response.
    """

    def __init__(self, url: str, model: str, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        if not model:
            raise ValueError(f"model must not be empty, got {model!r}")
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise ValueError(f"timeout_s must be finite and above 0, got {timeout_s!r}")
        self.url = url
        self.model = model
        self.timeout_s = timeout_s
        self._is_closed = False

    def generate(self, request: GenerateRequest, *, request_id: str | None = None) -> Generation:
        """Wait for the whole answer. Raises `ClientError`; `ValueError` for a request of several answers."""
        if request.num_sequences > 1:
            raise ValueError(
                f"num_return_sequences must be 1 for generate, got {request.num_return_sequences}; "
                "generate_all gives several answers"
            )
        (generation,) = self.generate_all(request, request_id=request_id)
        return generation

    def generate_all(self, request: GenerateRequest, *, request_id: str | None = None) -> tuple[Generation, ...]:
        """Wait for all `num_return_sequences` answers, in the order of their index. Raises `ClientError`."""
        responses = list(self._responses(request, _own_id(request_id), stream=False))
        if len(responses) != 1:
            raise ProtocolError(f"expected one response without streaming, got {len(responses)}")
        return Generation.all_from_chunks(responses[0])

    def stream(self, request: GenerateRequest, *, request_id: str | None = None) -> Generator[Chunk, None, None]:
        """Give the answer as it comes; of each sequence, the last chunk has a `finish_reason`. Raises `ClientError`.

        The request goes out with the first `next()`. Closing the iterator early stops the request on the
        server too, which takes as long as the server's acknowledgement (at most `STOP_TIMEOUT_S`).
        """
        return self._stream(request, _own_id(request_id))

    def stop(self, request_id: str) -> None:
        """End a running request of any client: its answer ends with the finish_reason "cancelled".

        Returns once the server has acknowledged it; nothing happens where no such request runs. Raises
        `ClientError`, after at most `STOP_TIMEOUT_S`.
        """
        self._check_open()
        _check_id(request_id)
        # What the engine answers doesn't matter, only that it has.
        for _ in self._exchange(
            f"{self.model}-engine",
            request_id,
            {contract.STOP: True},
            (),
            stream=False,
            timeout_s=STOP_TIMEOUT_S,
        ):
            pass

    def score(self, request: ScoreRequest) -> tuple[Score, ...]:
        """Score every text of the request; for models built with task score. Raises `ClientError`."""
        return Score.from_tensors(self.infer(self.model, request.to_tensors(), contract.SCORE.outputs))

    def infer(
        self, model: str, inputs: Mapping[TensorSpec, Tensor], outputs: tuple[TensorSpec, ...]
    ) -> dict[str, Tensor]:
        """Send whole tensors to `model`, which isn't decoupled, and read its one response. Raises `ClientError`."""
        self._check_open()
        return self._infer(model, uuid.uuid4().hex, inputs, outputs, self.timeout_s)

    def is_ready(self, model: str | None = None) -> bool:
        """Say whether `model` (None: the client's own) can be called; False too if nothing answers."""
        self._check_open()
        try:
            return self._is_model_ready(model or self.model, min(self.timeout_s, READY_TIMEOUT_S))
        except ClientError:
            return False

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
        with contextlib.closing(self._responses(request, request_id, stream=True)) as responses:
            for chunks in responses:
                yield from chunks

    def _responses(
        self, request: GenerateRequest, request_id: str, *, stream: bool
    ) -> Generator[list[Chunk], None, None]:
        """Give each response's chunks, up to the last sequence's end."""
        self._check_open()
        is_over = False  # the server has nothing left to do for this request
        reader = ChunkReader(request.num_sequences)
        responses = self._exchange(
            self.model,
            request_id,
            request.to_tensors(stream=stream),
            contract.GENERATE.outputs,
            stream=stream,
            timeout_s=self.timeout_s,
        )
        try:
            for outputs in responses:
                chunks = reader.read(outputs)
                is_over = reader.is_complete
                yield chunks
            if not is_over:
                raise ProtocolError("the responses ended without a finish_reason")
        except (RequestRejected, ServerUnavailable):
            is_over = True
            raise
        finally:
            # Whatever else ends it (an early close, Ctrl-C, a timeout, a broken answer): cancelling the call
            # alone doesn't reach an engine inside an ensemble, so the engine is told, and its last response is
            # waited for. Triton 2.51 never forgets an ensemble request whose caller hung up before that.
            if is_over or self._is_closed:
                responses.close()
            else:
                self._give_up(request_id)
                _drain(responses)

    def _give_up(self, request_id: str) -> None:
        try:
            self.stop(request_id)
        except ClientError as error:
            # Raising would hide why the request was given up.
            _logger.warning("request %s may still run: stopping it failed: %s", request_id, error)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClientError("the client is closed")

    @abstractmethod
    def _exchange(
        self,
        model: str,
        request_id: str,
        inputs: Mapping[TensorSpec, Scalar | tuple[str, ...]],
        outputs: tuple[TensorSpec, ...],
        *,
        stream: bool,
        timeout_s: float,
    ) -> Generator[dict[str, list[Scalar]], None, None]:
        """Send one request and give each response's `outputs`, those that it has, until the server ends it.

        A tensor of several elements is a tuple on its way in; every tensor is a list on its way out. Closing the
        generator cancels the call locally. Raises `ClientError`.
        """

    @abstractmethod
    def _infer(
        self,
        model: str,
        request_id: str,
        inputs: Mapping[TensorSpec, Tensor],
        outputs: tuple[TensorSpec, ...],
        timeout_s: float,
    ) -> dict[str, Tensor]:
        """Send one request and wait for its one response; of it, the `outputs` that it has. Raises `ClientError`."""

    @abstractmethod
    def _is_model_ready(self, model: str, timeout_s: float) -> bool:
        """Ask the server about one model. Raises `ClientError`."""

    @abstractmethod
    def _close_transport(self) -> None:
        """Release the connections."""


def _check_id(request_id: str) -> None:
    check_text("request_id", request_id)
    if not request_id:
        raise ValueError(f"request_id must not be empty, got {request_id!r}")


def _own_id(request_id: str | None) -> str:
    """The caller's id for a request, or one that nobody else has."""
    if request_id is None:
        return uuid.uuid4().hex
    _check_id(request_id)
    return request_id


def _drain(responses: Generator[dict[str, list[Scalar]], None, None]) -> None:
    """Read what is still on its way up to the last response, for at most `STOP_TIMEOUT_S`, and hang up."""

    def read() -> None:
        # The request is given up: how it ends, a closed client included, is nobody's business any more.
        with contextlib.suppress(Exception), contextlib.closing(responses):
            for _ in responses:
                pass

    # A thread, since a read can't be interrupted: one that outlasts the wait ends with the request's timeout.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(STOP_TIMEOUT_S)
