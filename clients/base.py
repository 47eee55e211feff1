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

from clients.api import DEFAULT_TIMEOUT_S, Chunk, GenerateRequest, Generation, Scalar
from clients.errors import ClientError, ProtocolError, RequestRejected, ServerUnavailable
from clients.score import Score, ScoreRequest, Tensor
from ensemble import contract
from ensemble.contract import TensorSpec

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

    def generate(self, request: GenerateRequest) -> Generation:
        """Wait for the whole answer. Raises `ClientError`."""
        chunks = list(self._chunks(request, stream=False))
        if len(chunks) != 1:
            raise ProtocolError(f"expected one response without streaming, got {len(chunks)}")
        return Generation.from_chunks(chunks)

    def stream(self, request: GenerateRequest) -> Generator[Chunk, None, None]:
        """Give the answer as it comes; only the last chunk has a `finish_reason`. Raises `ClientError`.

        The request goes out with the first `next()`. Closing the iterator early stops the request on the
        server too, which takes as long as the server's acknowledgement (at most `STOP_TIMEOUT_S`).
        """
        return self._chunks(request, stream=True)

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

    def _chunks(self, request: GenerateRequest, *, stream: bool) -> Generator[Chunk, None, None]:
        self._check_open()
        request_id = uuid.uuid4().hex
        is_over = False  # the server has nothing left to do for this request
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
                if is_over:
                    raise ProtocolError("a response came after the one with a finish_reason")
                chunk = Chunk.from_outputs(outputs)
                is_over = chunk.finish_reason != ""
                yield chunk
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
                self._stop(request_id)
                _drain(responses)

    def _stop(self, request_id: str) -> None:
        try:
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
        inputs: Mapping[TensorSpec, Scalar],
        outputs: tuple[TensorSpec, ...],
        *,
        stream: bool,
        timeout_s: float,
    ) -> Generator[dict[str, Scalar], None, None]:
        """Send one request and give each response's `outputs` until the server ends it.

        Every tensor has one element. Closing the generator cancels the call locally. Raises `ClientError`.
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


def _drain(responses: Generator[dict[str, Scalar], None, None]) -> None:
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
