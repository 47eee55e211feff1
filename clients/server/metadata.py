"""A model's metadata and the names of a server's models, over either protocol, of any Triton.

An address in, plain values out. It knows nothing of commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from deepseek_triton.clients.connect import ProtocolName
from deepseek_triton.clients.errors import RequestRejected, ServerUnavailable

# From a protocol's port to that of the metrics, as tritonserver numbers them by default: 8000, 8001, 8002.
TO_METRICS: dict[ProtocolName, int] = {"http": 2, "grpc": 1}
NOT_FOUND = 404
_MODEL_LABEL = re.compile(r'^nv_inference_request_success\{model="([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class ModelMetadata:
    """What any Triton tells of a model that is loaded. versions: ascending; inputs, outputs: the tensors' names."""

    versions: tuple[int, ...]
    inputs: frozenset[str]
    outputs: frozenset[str]


def ask_metadata(protocol: ProtocolName, url: str, model: str, timeout_s: float) -> ModelMetadata | None:
    """The model's metadata; None if the server has no such model loaded.

    Raises:
        ServerUnavailable: nothing answers, or not as a Triton does.
        RequestRejected: the server doesn't tell.
    """
    return (_metadata_grpc if protocol == "grpc" else _metadata_http)(url, model, timeout_s)


def loaded_versions(protocol: ProtocolName, url: str, model: str, timeout_s: float) -> tuple[int, ...] | None:
    """The versions of `model` that are loaded, ascending; () if the server hasn't the model, None if none answers."""
    try:
        metadata = ask_metadata(protocol, url, model, timeout_s)
    except ServerUnavailable:
        return None
    except RequestRejected:
        return ()
    return metadata.versions if metadata else ()


def ask_names(protocol: ProtocolName, url: str, timeout_s: float) -> list[str]:
    """The names of all models of the server: from its index or, where that is closed, from its metrics; else none."""
    names = (_index_grpc if protocol == "grpc" else _index_http)(url, timeout_s)
    return names or _names_in_metrics(protocol, url, timeout_s)


def read_host(url: str) -> tuple[str, int | None, str]:
    """Host (an IPv6 address in brackets), port and path of an address of either form."""
    parts = urlsplit(url if "://" in url else f"//{url}")
    host = parts.hostname or ""
    return (f"[{host}]" if ":" in host else host), parts.port, parts.path


def _metadata_grpc(url: str, model: str, timeout_s: float) -> ModelMetadata | None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with _channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            answer = stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=model), timeout=timeout_s)
        except grpc.RpcError as error:
            text = str(error.details())
            if error.code() == grpc.StatusCode.NOT_FOUND or "unknown model" in text:
                return None
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ServerUnavailable(text) from error
            raise RequestRejected(text) from error
    return _metadata(answer.versions, answer.inputs, answer.outputs)


def _metadata_http(url: str, model: str, timeout_s: float) -> ModelMetadata | None:
    status, fields = _get_json(f"{url}/v2/models/{quote(model, safe='')}", timeout_s)
    if "error" in fields:
        if "unknown model" in str(fields["error"]):
            return None
        # Triton answers so below a path that it doesn't have.
        raise (ServerUnavailable if status == NOT_FOUND else RequestRejected)(str(fields["error"]))
    try:
        return _metadata(fields["versions"], *(map(_Named, fields[key]) for key in ("inputs", "outputs")))
    except (KeyError, TypeError, ValueError) as error:
        raise ServerUnavailable(f"the answer is no model's metadata: {error!r}") from error


class _Named:
    def __init__(self, fields: dict[str, Any]) -> None:
        self.name = str(fields["name"])


def _metadata(versions: Iterable[str], inputs: Iterable[Any], outputs: Iterable[Any]) -> ModelMetadata:
    names = (frozenset(tensor.name for tensor in tensors) for tensors in (inputs, outputs))
    return ModelMetadata(tuple(sorted(map(int, versions))), *names)


def _index_grpc(url: str, timeout_s: float) -> list[str]:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with _channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            index = stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True), timeout=timeout_s)
        except grpc.RpcError:
            return []
    return sorted({entry.name for entry in index.models})


def _index_http(url: str, timeout_s: float) -> list[str]:
    try:
        entries = _send("POST", f"{url}/v2/repository/index", timeout_s, content='{"ready": true}').json()
        return sorted({str(entry["name"]) for entry in entries})
    except (ServerUnavailable, ValueError, TypeError, KeyError):  # closed: an object with the error
        return []


def _names_in_metrics(protocol: ProtocolName, url: str, timeout_s: float) -> list[str]:
    host, port, _ = read_host(url)
    if port is None:
        return []
    try:
        text = _send("GET", f"http://{host}:{port + TO_METRICS[protocol]}/metrics", timeout_s).text
    except ServerUnavailable:
        return []
    return sorted(set(_MODEL_LABEL.findall(text)))


def _channel(url: str) -> Any:
    import grpc

    return grpc.insecure_channel(url, options=[("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)])


def _get_json(url: str, timeout_s: float) -> tuple[int, dict[str, Any]]:
    """The status and the object that a GET is answered with."""
    response = _send("GET", url, timeout_s)
    try:
        fields = response.json()
    except ValueError as error:
        raise ServerUnavailable(f"HTTP status {response.status_code}, without JSON") from error
    if not isinstance(fields, dict):
        raise ServerUnavailable(f"HTTP status {response.status_code}, without a JSON object")
    return response.status_code, fields


def _send(method: str, url: str, timeout_s: float, **options: Any) -> Any:
    import httpx

    try:
        with httpx.Client(transport=httpx.HTTPTransport()) as client:  # no proxy of the environment's
            return client.request(method, url, timeout=timeout_s, **options)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerUnavailable(str(error)) from error
