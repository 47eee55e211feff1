"""AsyncCatalogue: which models a server has and what each of them does, over gRPC. It calls none of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek_triton.clients import grpc_wire
from deepseek_triton.clients.errors import RequestRejected
from deepseek_triton.clients.life import READY_TIMEOUT_S
from deepseek_triton.ensemble.protocol import contract

ModelTask = Literal["generate", "report", "score"]
# The output that tells what a model does: no other kind of model has it.
_TASK_OUTPUTS: dict[ModelTask, str] = {
    "generate": contract.FINISH_REASON.name,
    "score": contract.PROBABILITIES.name,
}
RESTRICTED = "restricted"  # in the error of a server that keeps its index for its administrator
ADMIN_METADATA = "triton-grpc-protocol-x-triton-admin"  # as `deepseek-triton serve` names the administrator's header
# What stands behind an ensemble's name in the names of its parts; clients don't call these.
_PART_SUFFIXES = ("-tokenizer", "-engine", "-detokenizer", "-scorer", "-vllm", "-infer")


@dataclass(frozen=True)
class ServedModel:
    """A model that clients call: its name, what it does, and whether it gives embeddings."""

    name: str
    task: ModelTask
    embeds: bool = False


class AsyncCatalogue:
    """Asks the server at `url`, which is `host:port`, about its models; each question waits `READY_TIMEOUT_S` at most.

    Tasks of one event loop may share one catalogue. admin_key: for a server that restricts its index; "": none is sent.
    """

    def __init__(self, url: str, admin_key: str = "") -> None:
        grpc_wire.check_url(url)
        self.url = url
        self._metadata = ((ADMIN_METADATA, admin_key),) if admin_key else ()
        self._channel: Any = None  # belongs to the event loop of the first question
        self._stub: Any = None

    async def is_live(self) -> bool:
        """Say whether the server answers; False too if nothing does."""
        try:
            message = service_pb2.ServerLiveRequest()
            return bool((await self._connected().ServerLive(message, timeout=READY_TIMEOUT_S)).live)
        except grpc.RpcError:
            return False

    async def names(self) -> tuple[str, ...]:
        """The names of the ready models, without the ensembles' parts.

        Raises `ClientError`; `RequestRejected` where the server restricts its index to its administrator.
        """
        message = service_pb2.RepositoryIndexRequest(ready=True)
        try:
            index = await self._connected().RepositoryIndex(message, timeout=READY_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            if RESTRICTED in (error.details() or ""):  # with the code UNAVAILABLE, as if nothing answered
                raise RequestRejected(f"its index is {RESTRICTED}") from error
            raise grpc_wire.client_error(error, self.url, READY_TIMEOUT_S) from error
        names = {model.name for model in index.models}
        parts = {f"{name}{suffix}" for name in names for suffix in _PART_SUFFIXES}
        return tuple(sorted(names - parts))

    async def model(self, name: str) -> ServedModel | None:
        """Describe one model; None: it isn't there, or does nothing that this project's clients can call.

        Raises `ClientError`.
        """
        message = service_pb2.ModelMetadataRequest(name=name)
        try:
            metadata = await self._connected().ModelMetadata(message, timeout=READY_TIMEOUT_S)
        except grpc.RpcError as error:
            if _is_absent(error):
                return None
            raise grpc_wire.client_error(error, self.url, READY_TIMEOUT_S) from error
        outputs = {output.name for output in metadata.outputs}
        tasks = [task for task, output in _TASK_OUTPUTS.items() if output in outputs]
        if not tasks:
            return None
        if any(tensor.name == contract.IMAGE.name for tensor in metadata.inputs):
            return ServedModel(name, "report")
        return ServedModel(name, tasks[0], contract.EMBEDDING.name in outputs)

    async def models(self, names: tuple[str, ...]) -> tuple[ServedModel, ...]:
        """Describe those of `names` that are there. Raises `ClientError`."""
        found = await asyncio.gather(*map(self.model, names))
        return tuple(model for model in found if model is not None)

    async def close(self) -> None:
        """Release the connection."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncCatalogue:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _connected(self) -> Any:
        if self._stub is None:
            self._channel = grpc.aio.insecure_channel(self.url, options=grpc_wire.CHANNEL_OPTIONS)
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        return self._stub


def _is_absent(error: Any) -> bool:
    """Whether the server knows no such model: 2.51 says so with either of two codes."""
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return True
    return error.code() is grpc.StatusCode.UNAVAILABLE and "model" in str(error.details())
