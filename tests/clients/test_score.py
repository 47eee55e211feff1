"""score on both clients: tensors there and back, and what the console prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import httpx
import numpy as np
import pytest
from tritonclient import utils as triton_utils
from tritonclient.grpc import service_pb2

from deepseek_triton.builders import cli
from deepseek_triton.clients.async_grpc import AsyncGrpcClient
from deepseek_triton.clients.async_http import AsyncHttpClient
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.errors import (
    ClientError,
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerUnavailable,
)
from deepseek_triton.clients.examples import score_examples
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.clients.http import HttpClient
from deepseek_triton.clients.score import Score, ScoreRequest, Tensor
from tests.support.blocking import Blocking

OUTPUTS: dict[str, tuple[str, list[int], list[Any]]] = {
    "label": ("BYTES", [2, 1], ["gut", "böse"]),
    "scored_labels": ("BYTES", [2, 2], ["gut", "böse", "gut", "böse"]),
    "probabilities": ("FP32", [2, 2], [0.75, 0.25, 0.5, 0.5]),
    "log_probs": ("FP32", [2, 2], [-1.0, -2.0, -3.0, -3.0]),
    "is_calibrated": ("BOOL", [2, 1], [True, False]),
    "num_input_tokens": ("INT32", [2, 1], [5, 7]),
    "something_newer": ("FP32", [2, 1], [0.0, 0.0]),
}
SCORES = (
    Score("gut", {"gut": 0.75, "böse": 0.25}, {"gut": -1.0, "böse": -2.0}, True, 5),
    Score("böse", {"gut": 0.5, "böse": 0.5}, {"gut": -3.0, "böse": -3.0}, False, 7),
)
NUMPY = {"FP32": np.float32, "BOOL": np.bool_, "INT32": np.int32}


def grpc_response(outputs: dict[str, tuple[str, list[int], list[Any]]]) -> Any:
    """Encoded by tritonclient's own means."""
    response = service_pb2.ModelInferResponse()
    for name, (datatype, shape, values) in outputs.items():
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        if datatype == "BYTES":
            array = np.array([value.encode() for value in values], np.object_)
            raw = triton_utils.serialize_byte_tensor(array).item()
        else:
            raw = np.array(values, NUMPY[datatype]).tobytes()
        response.raw_output_contents.append(raw)
    return response


OPEN: list[BaseClient | Blocking] = []


class Wire:
    """One client whose server is a function from inputs to outputs. `kind`: a protocol, and "-async" for asyncio."""

    def __init__(self, kind: str, outputs: dict[str, Any], fault: Any = None) -> None:
        self.outputs, self.fault = outputs, fault
        self.received: dict[str, tuple[list[int], list[Any]]] = {}
        self.model = ""
        client = self._make_client(kind)
        OPEN.append(client)
        self.client = cast(BaseClient, client)

    def _make_client(self, kind: str) -> BaseClient | Blocking:
        url = "http://localhost:1"
        if kind == "grpc":
            grpc_client = GrpcClient("localhost:1", "m")
            grpc_client._stub = SimpleNamespace(ModelInfer=self._grpc)
            return grpc_client
        if kind == "grpc-async":
            async_grpc_client = AsyncGrpcClient("localhost:1", "m")
            async_grpc_client._stub = SimpleNamespace(ModelInfer=self._async_grpc)
            return Blocking(async_grpc_client)
        transport = httpx.MockTransport(self._http)
        if kind == "http":
            http_client = HttpClient(url, "m")
            http_client._client = httpx.Client(transport=transport, base_url=url)
            return http_client
        async_http_client = AsyncHttpClient(url, "m")
        async_http_client._client = httpx.AsyncClient(transport=transport, base_url=url)
        return Blocking(async_http_client)

    async def _async_grpc(self, message: Any, timeout: float) -> Any:
        return self._grpc(message, timeout)

    def _grpc(self, message: Any, timeout: float) -> Any:
        if isinstance(self.fault, Exception):
            raise self.fault
        self.model = message.model_name
        for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True):
            values = triton_utils.deserialize_bytes_tensor(raw)
            self.received[tensor.name] = (list(tensor.shape), [value.decode() for value in values])
        return grpc_response(self.outputs)

    def _http(self, request: httpx.Request) -> httpx.Response:
        if isinstance(self.fault, Exception):
            raise self.fault
        if isinstance(self.fault, httpx.Response):
            return httpx.Response(self.fault.status_code, content=self.fault.content)  # one that nobody has read
        self.model = request.url.path.removeprefix("/v2/models/").removesuffix("/infer")
        for tensor in json.loads(request.content)["inputs"]:
            self.received[tensor["name"]] = (tensor["shape"], tensor["data"])
        outputs = [
            {"name": name, "datatype": datatype, "shape": shape, "data": values}
            for name, (datatype, shape, values) in self.outputs.items()
        ]
        return httpx.Response(200, json={"outputs": outputs})


@pytest.fixture(params=["grpc", "http", "grpc-async", "http-async"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    """Close every client at the test's end."""
    yield
    while OPEN:
        client = OPEN.pop()
        client.end() if isinstance(client, Blocking) else client.close()


def test_texts_and_labels_go_and_scores_come(protocol: str) -> None:
    wire = Wire(protocol, OUTPUTS)
    assert wire.client.score(ScoreRequest(texts=["hällo", ""], labels=["gut", "böse"])) == SCORES
    assert wire.model == "m"
    assert wire.received == {
        "text_input": ([2, 1], ["hällo", ""]),
        "labels": ([2, 2], ["gut", "böse", "gut", "böse"]),
    }


def test_chats_go_as_json_and_labels_may_stay_away(protocol: str) -> None:
    wire = Wire(protocol, OUTPUTS)
    wire.client.score(ScoreRequest(chats=[[{"role": "user", "content": "ü"}], [{"role": "user", "content": "b"}]]))
    (name,) = wire.received
    shape, chats = wire.received[name]
    assert (name, shape, [json.loads(chat)["messages"][0]["content"] for chat in chats]) == (
        "messages",
        [2, 1],
        ["ü", "b"],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": None}, "output probabilities is missing"),
        ({"probabilities": ("FP32", [2, 1], [1.0, 1.0])}, "2 labels came with 1 probabilities"),
        ({"label": ("BYTES", [1, 1], ["gut"])}, "different numbers of rows"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_an_error(protocol: str, change: dict[str, Any], message: str) -> None:
    outputs = {name: value for name, value in {**OUTPUTS, **change}.items() if value is not None}
    with pytest.raises(ProtocolError, match=message):
        Wire(protocol, outputs).client.score(ScoreRequest(texts="x"))


def test_bytes_that_are_no_tensor_are_an_error() -> None:
    with pytest.raises(ProtocolError, match=r"output probabilities must be FP32, got INT32"):
        wire = Wire("grpc", {**OUTPUTS, "probabilities": ("INT32", [2, 2], [1, 2, 3, 4])})
        wire.client.score(ScoreRequest(texts="x"))
    with pytest.raises(ProtocolError, match=r"output label must be of shape \[2, 1\], got 1 elements"):
        Wire("grpc", {**OUTPUTS, "label": ("BYTES", [2, 1], ["gut"])}).client.score(ScoreRequest(texts="x"))
    with pytest.raises(ProtocolError, match="isn't one of infer"):
        Wire("http", OUTPUTS, httpx.Response(200, json={})).client.score(ScoreRequest(texts="x"))


class FakeRpcError(grpc.RpcError):  # type: ignore[misc]
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "labels holds 1 label"


@pytest.mark.parametrize("suffix", ["", "-async"])
@pytest.mark.parametrize(
    ("protocol", "fault", "kind"),
    [
        ("grpc", FakeRpcError(grpc.StatusCode.INVALID_ARGUMENT), RequestRejected),
        ("grpc", FakeRpcError(grpc.StatusCode.UNAVAILABLE), ServerUnavailable),
        ("grpc", FakeRpcError(grpc.StatusCode.DEADLINE_EXCEEDED), RequestTimeout),
        ("http", httpx.Response(400, json={"error": "labels holds 1 label"}), RequestRejected),
        ("http", httpx.ConnectError("no"), ServerUnavailable),
        ("http", httpx.ReadTimeout("late"), RequestTimeout),
    ],
)
def test_faults_are_the_clients_own_errors(protocol: str, fault: Any, kind: type[ClientError], suffix: str) -> None:
    with pytest.raises(kind) as caught:
        Wire(protocol + suffix, OUTPUTS, fault).client.score(ScoreRequest(texts="x", labels=["a"]))
    assert type(caught.value) is kind
    if kind is RequestRejected:
        assert str(caught.value) == "labels holds 1 label"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of texts and chats"),
        ({"texts": "x", "chats": [[]]}, "exactly one of texts and chats"),
        ({"texts": []}, r"texts must not be empty, got \[\]"),
        ({"texts": [3]}, r"texts\[0\] must be text, got 3"),
        ({"texts": "x", "labels": "ab"}, "labels must be several texts, got 'ab'"),
        ({"texts": "x", "labels": []}, "labels must not be empty"),
        ({"texts": "\ud800"}, r"texts\[0\] must be text that UTF-8 can encode"),
        ({"chats": []}, "chats must not be empty"),
        ({"chats": [[{"role": "user"}]]}, "content must be text or a list of parts"),
    ],
)
def test_requests_at_fault(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreRequest(**arguments)


def test_a_tensor_has_as_many_values_as_its_shape_says() -> None:
    assert Tensor((2, 2), [1, 2, 3, 4]).rows() == [[1, 2], [3, 4]]
    with pytest.raises(ProtocolError, match=r"shape \[2, 2\] came with 3 values"):
        Tensor((2, 2), [1, 2, 3])


# The console


class FakeClient:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[ScoreRequest] = []

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None: ...

    def score(self, request: ScoreRequest) -> tuple[Score, ...]:
        self.asked.append(request)
        if self.error:
            raise self.error
        return SCORES[:1]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr("deepseek_triton.clients.cli.connect", lambda *arguments: fake)
    return fake


def test_the_console_prints_labels_the_likeliest_first(client: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "m", "x", "--labels", "böse, gut"]) == 0
    assert capsys.readouterr().out == "gut\t0.7500\nböse\t0.2500\n"
    assert client.asked == [ScoreRequest(texts="x", labels=("böse", "gut"))]
    assert cli.main(["score", "m", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["probabilities"] == {"gut": 0.75, "böse": 0.25}


def test_each_line_of_standard_input_is_a_text(
    client: FakeClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", iter(["one\n", "  \n", "two", "\n"]))
    assert cli.main(["score", "m", "-"]) == 0
    assert capsys.readouterr().out == "gut\t0.7500\n" * 2
    assert [request.texts for request in client.asked] == [("one",), ("two",)]
    monkeypatch.setattr("sys.stdin", iter(["\n", "\udcff\n"]))
    assert cli.main(["score", "m", "-"]) == 1
    assert capsys.readouterr().err.startswith("error: line 2: texts[0] must be text that UTF-8 can encode")
    client.error = RequestRejected("the prompt has 999 tokens")
    monkeypatch.setattr("sys.stdin", iter(["long\n"]))
    assert cli.main(["score", "m", "-"]) == 1
    assert capsys.readouterr().err.startswith("error: line 1: the prompt has 999 tokens")


def test_errors_are_one_line(client: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    client.error = RequestRejected("labels holds 1 label")
    assert cli.main(["score", "m", "x", "--labels", "a"]) == 1
    assert capsys.readouterr().err.startswith("error: labels holds 1 label\n")


def test_examples_use_the_models_own_labels() -> None:
    for has_labels in (True, False):
        ways = score_examples("m", "http://a:1", "a:2", has_labels=has_labels)
        assert [("labels" in command) for command in ways.values()] == [not has_labels] * 3
