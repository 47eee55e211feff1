"""The life of one request, without input or output: what goes out, what each response adds, when the server is told.

Synchronous and asyncio clients share it; they differ in how they wait.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepseek_triton.clients.api import GenerateRequest, Generation
from deepseek_triton.clients.checks import check_text
from deepseek_triton.clients.errors import ClientError, ProtocolError, RequestRejected, ServerUnavailable
from deepseek_triton.clients.request import Scalar, Value
from deepseek_triton.clients.response import Chunk, ChunkReader
from deepseek_triton.clients.score import ANY_LABELS, EMBED_OUTPUTS, ScoreRequest, Tensor
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec

# The longest wait for the engine to acknowledge a stop request, in seconds.
STOP_TIMEOUT_S = 2.0
# The longest wait for a readiness probe, in seconds.
READY_TIMEOUT_S = 5.0

Response = dict[str, list[Scalar]]  # an output's name → its values


@dataclass(frozen=True)
class StreamCall:
    """One request to a decoupled model: `model` gives any number of responses, of which `outputs` are read.

    is_streamed: whether more than one response may come. timeout_s: seconds until the last one must be there.
    parameters: the request's parameters, which are no tensors. headers: of the call, names in lower case.
    """

    model: str
    request_id: str
    inputs: Mapping[TensorSpec, Value]
    outputs: tuple[TensorSpec, ...]
    timeout_s: float
    is_streamed: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorCall:
    """One request of whole tensors to a model that gives one response, of which `outputs` are read.

    parameters: the request's parameters, which are no tensors.
    """

    model: str
    request_id: str
    inputs: Mapping[TensorSpec, Tensor]
    outputs: tuple[TensorSpec, ...]
    timeout_s: float
    parameters: Mapping[str, str] = field(default_factory=dict)


class ClientCore:
    """What every client has: its server, its model, its time limit, and whether it is closed.

    `model` is the served ensemble; `timeout_s` bounds a whole request, from its sending to its last response. `engine`
    is the model that generates for it, which is told to stop; assign another's where ensembles share one.
    """

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        if not model:
            raise ValueError(f"model must not be empty, got {model!r}")
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise ValueError(f"timeout_s must be finite and above 0, got {timeout_s!r}")
        self.url = url
        self.model = model
        self.engine = f"{model}-engine"
        self.timeout_s = timeout_s
        self._is_closed = False
        # The server lets this client alone stop its requests. Who knows a random id, such as `own_id` makes, may too.
        self._parameters = {contract.STOP_KEY: secrets.token_urlsafe(16)}

    def _begin(
        self, request: GenerateRequest, request_id: str, *, stream: bool, headers: Mapping[str, str] | None = None
    ) -> RequestLife:
        inputs = request.to_tensors(stream=stream)
        return self._begin_tensors(inputs, request_id, request.num_sequences, stream=stream, headers=headers)

    def _begin_tensors(
        self,
        inputs: Mapping[TensorSpec, Value],
        request_id: str,
        num_sequences: int = 1,
        *,
        stream: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> RequestLife:
        self._check_open()
        call = StreamCall(
            self.model, request_id, inputs, contract.GENERATE.outputs, self.timeout_s, stream, self._parameters,
            headers or {},
        )  # fmt: skip
        return RequestLife(call, num_sequences)

    def _stop_call(self, request_id: str) -> StreamCall:
        """The call that ends a running request. The engine's answer doesn't matter, only that it has come."""
        self._check_open()
        check_id(request_id)
        return StreamCall(self.engine, request_id, {contract.STOP: True}, (), STOP_TIMEOUT_S, False, self._parameters)

    def _describe_call(self) -> StreamCall:
        """The call that asks the engine what it serves."""
        outputs = (contract.MAX_SEQ_LEN,)
        return StreamCall(self.engine, uuid.uuid4().hex, {contract.DESCRIBE: True}, outputs, self._ready_timeout_s)

    def _score_call(self, request: ScoreRequest) -> TensorCall:
        return self._tensor_call(self.model, request.to_tensors(), contract.SCORE.outputs)

    def _embed_call(self, texts: str | Sequence[str]) -> TensorCall:
        return self._tensor_call(self.model, ScoreRequest(texts=texts, labels=ANY_LABELS).to_tensors(), EMBED_OUTPUTS)

    def _tensor_call(
        self, model: str, inputs: Mapping[TensorSpec, Tensor], outputs: tuple[TensorSpec, ...]
    ) -> TensorCall:
        self._check_open()
        return TensorCall(model, uuid.uuid4().hex, inputs, outputs, self.timeout_s)

    def _build_call(self) -> TensorCall:
        """The call that asks the tokenizer, of either kind of model, which build is loaded."""
        return TensorCall(
            f"{self.model}-tokenizer",
            uuid.uuid4().hex,
            {contract.TEXT_INPUT: Tensor((1, 1), ("x",))},
            (contract.PROMPT_INFO, contract.SCORED_LABELS),
            self._ready_timeout_s,
            {contract.DESCRIBE_BUILD: "1"},
        )

    @property
    def _ready_timeout_s(self) -> float:
        self._check_open()
        return min(self.timeout_s, READY_TIMEOUT_S)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClientError("the client is closed")


class RequestLife:
    """One request from its sending to its last response.

    call: what goes out. is_over: whether the server has nothing left to do for the request; a request that is given up
    before that must be stopped on the server.
    """

    def __init__(self, call: StreamCall, num_sequences: int) -> None:
        self.call = call
        self.is_over = False
        self._reader = ChunkReader(num_sequences)

    def read(self, response: Response) -> list[Chunk]:
        """Give the chunks of one response. Raises `ProtocolError`."""
        chunks = self._reader.read(response)
        self.is_over = self._reader.is_complete
        return chunks

    def end(self) -> None:
        """Say that the server has ended the call. Raises `ProtocolError` if a sequence has no end."""
        if not self.is_over:
            raise ProtocolError("the responses ended without a finish_reason")

    def fail(self, error: BaseException) -> None:
        """Say that the call has failed: the server runs no request that it has refused or that it has lost."""
        if isinstance(error, RequestRejected | ServerUnavailable):
            self.is_over = True


def whole_answers(responses: Sequence[list[Chunk]]) -> tuple[Generation, ...]:
    """The answers to a request that isn't streamed: all in one response, or, over gRPC, one in each."""
    chunks = [chunk for response in responses for chunk in response]
    if len(chunks) != len({chunk.sequence_index for chunk in chunks}) or not chunks:
        raise ProtocolError(f"expected one response without streaming, got {len(responses)}")
    return Generation.all_from_chunks(chunks)


def read_max_seq_len(responses: Sequence[Response]) -> int:
    """The tokens that the engine's description names."""
    values = [value for response in responses for value in response.get(contract.MAX_SEQ_LEN.name, [])]
    if len(values) != 1:
        raise ProtocolError(f"the engine must tell one max_seq_len, got {values}")
    return int(values[0])


def read_build(outputs: Mapping[str, Tensor]) -> str:
    """The identity that a tokenizer tells; empty if it has none."""
    texts = [value for tensor in outputs.values() for value in tensor.values]
    return str(texts[0]) if len(texts) == 1 else ""


def check_single(request: GenerateRequest) -> None:
    """Refuse a request of several answers."""
    if request.num_sequences > 1:
        raise ValueError(
            f"num_return_sequences must be 1 for generate, got {request.num_return_sequences}; "
            "generate_all gives several answers"
        )


def check_id(request_id: str) -> None:
    """Refuse what is no request id."""
    check_text("request_id", request_id)
    if not request_id:
        raise ValueError(f"request_id must not be empty, got {request_id!r}")


def own_id(request_id: str | None) -> str:
    """The caller's id for a request, or a unique one."""
    if request_id is None:
        return uuid.uuid4().hex
    check_id(request_id)
    return request_id
