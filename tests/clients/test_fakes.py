"""In-process servers that speak Triton's two protocols on a loopback port, for the tests of the clients.

Both play the same scripts: a script gets what was received and yields replies. They decode and encode with
tritonclient's and the standard library's own means, not with the code under test.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import numpy as np
from tritonclient import utils as triton_utils
from tritonclient.grpc import service_pb2

MODEL = "tiny"
UNKNOWN = "Request for unknown model: '{}' is not found"
SERVICE = "inference.GRPCInferenceService"
LISTS = ("stop_words", "bad_words")  # inputs of dims [-1]


@dataclass(frozen=True)
class Received:
    method: str
    model: str
    request_id: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Fail:
    """An error as the server tells it."""

    text: str
    status: int = 400


@dataclass(frozen=True)
class Break:
    """The connection ends here."""


Reply = dict[str, Any] | Fail | Break
Script = Callable[[Received], Iterator[Reply]]


def reply(text: str, finish_reason: str = "", num_output_tokens: int = 1, **more: Any) -> dict[str, Any]:
    """A response that tells of one sequence; `more` outputs by name."""
    return {
        "text_output": text,
        "finish_reason": finish_reason,
        "num_input_tokens": 3,
        "num_output_tokens": num_output_tokens,
        **more,
    }


def rows(*replies: dict[str, Any]) -> dict[str, Any]:
    """One response that tells of several sequences; each output's values lie one behind the other."""
    joined: dict[str, Any] = {name: [] for one in replies for name in one}
    for one in replies:
        for name, value in one.items():
            joined[name] += value if isinstance(value, list) else [value]
    return joined


def say(*texts: str, finish_reason: str = "stop") -> Script:
    """Answer with these texts, or, when not streaming, with all of them at once."""

    def script(received: Received) -> Iterator[Reply]:
        if not received.inputs["stream"]:
            yield reply("".join(texts), finish_reason, len(texts))
            return
        for count, text in enumerate(texts, start=1):
            yield reply(text, finish_reason if count == len(texts) else "", count)

    return script


class FakeServer(ABC):
    """What both servers share. `hang` is set at the end, so that scripts which wait for it end too."""

    url: str

    def __init__(self, script: Script, on_stop: Fail | None = None, port: int = 0) -> None:
        self.script = script
        self.on_stop = on_stop
        self.ready_models = {MODEL}
        # Model → the names of its inputs and of its outputs.
        self.tensors = {MODEL: (["text_input", "messages", "stream"], ["text_output", "finish_reason"])}
        self.tells_index = True
        self.max_seq_len: int | None = 256  # None: an engine of before, which doesn't tell it
        self.port = port
        self.hang = threading.Event()
        self._received: list[Received] = []

    @abstractmethod
    def __enter__(self) -> FakeServer: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @property
    def generated(self) -> list[Received]:
        return [received for received in self._received if received.model == MODEL]

    @property
    def stopped(self) -> list[str]:
        """The ids of the requests that the engine was told to stop."""
        return [
            received.request_id
            for received in self._received
            if received.model == f"{MODEL}-engine" and received.inputs == {"stop": True}
        ]

    def wait_for_stop(self, timeout_s: float) -> None:
        """Wait as an engine does that generates: until a request is stopped, or the server."""
        deadline = time.monotonic() + timeout_s
        while not self.stopped and not self.hang.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)

    def play(self, received: Received) -> Iterator[Reply]:
        self._received.append(received)
        if not received.model.endswith("-engine"):
            yield from self.script(received)
        elif "describe" in received.inputs:
            yield {"max_seq_len": self.max_seq_len} if self.max_seq_len else Fail("there is no input describe")
        elif self.on_stop is not None:
            yield self.on_stop
        elif self.url.startswith("http"):  # over gRPC the engine ends the call with an empty response
            yield {"output_ids": [], "progress": '[0,null,true,false,null,[0,0,0,"cancelled",0,null,null]]'}


class FakeGrpcServer(FakeServer):
    def __enter__(self) -> FakeGrpcServer:
        self._server = grpc.server(ThreadPoolExecutor(max_workers=40))
        handlers = {
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                self._stream_infer,
                service_pb2.ModelInferRequest.FromString,
                service_pb2.ModelStreamInferResponse.SerializeToString,
            ),
            "ModelReady": grpc.unary_unary_rpc_method_handler(
                lambda request, context: service_pb2.ModelReadyResponse(ready=request.name in self.ready_models),
                service_pb2.ModelReadyRequest.FromString,
                service_pb2.ModelReadyResponse.SerializeToString,
            ),
            "ModelMetadata": grpc.unary_unary_rpc_method_handler(
                self._metadata,
                service_pb2.ModelMetadataRequest.FromString,
                service_pb2.ModelMetadataResponse.SerializeToString,
            ),
            "RepositoryIndex": grpc.unary_unary_rpc_method_handler(
                self._index,
                service_pb2.RepositoryIndexRequest.FromString,
                service_pb2.RepositoryIndexResponse.SerializeToString,
            ),
            "ServerLive": grpc.unary_unary_rpc_method_handler(
                lambda request, context: service_pb2.ServerLiveResponse(live=True),
                service_pb2.ServerLiveRequest.FromString,
                service_pb2.ServerLiveResponse.SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.url = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{self.port}')}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang.set()
        self._server.stop(grace=0).wait(5)

    def _metadata(self, request: Any, context: Any) -> Any:
        if request.name not in self.tensors:
            context.abort(grpc.StatusCode.NOT_FOUND, UNKNOWN.format(request.name))
        answer = service_pb2.ModelMetadataResponse(name=request.name, versions=["1"])
        for tensors, names in zip((answer.inputs, answer.outputs), self.tensors[request.name], strict=True):
            for name in names:
                tensors.add(name=name)
        return answer

    def _index(self, request: Any, context: Any) -> Any:
        if not self.tells_index:
            context.abort(grpc.StatusCode.UNAVAILABLE, "This protocol is restricted")
        answer = service_pb2.RepositoryIndexResponse()
        for name in self.tensors:
            answer.models.add(name=name)
        return answer

    def _stream_infer(self, messages: Iterator[Any], context: Any) -> Iterator[Any]:
        for message in messages:
            inputs = {}
            for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True):
                values = _from_wire(tensor.datatype, raw)
                assert list(tensor.shape) == [1, len(values)], tensor
                inputs[tensor.name] = values if tensor.name in LISTS else values[0]
            received = Received("ModelStreamInfer", message.model_name, message.id, inputs)
            for answer in self.play(received):
                if isinstance(answer, Break):
                    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                elif isinstance(answer, Fail):
                    yield service_pb2.ModelStreamInferResponse(error_message=answer.text)
                    return
                else:
                    yield service_pb2.ModelStreamInferResponse(infer_response=_to_wire(answer, message))


def _from_wire(datatype: str, raw: bytes) -> list[Any]:
    if datatype == "BYTES":
        return [value.decode() for value in triton_utils.deserialize_bytes_tensor(raw)]
    values: list[Any] = np.frombuffer(raw, triton_utils.triton_to_np_dtype(datatype)).tolist()
    return values


def _to_wire(answer: dict[str, Any], message: Any) -> Any:
    response = service_pb2.ModelInferResponse(model_name=message.model_name, id=message.id)
    for name, value in answer.items():
        values = value if isinstance(value, list) else [value]
        datatype = _datatype(name, values)
        response.outputs.add(name=name, datatype=datatype, shape=[1, len(values)])
        if datatype == "BYTES":
            raw = b"".join(
                triton_utils.serialize_byte_tensor(np.array([text.encode()], object)).item() for text in values
            )
        else:
            raw = np.array(values, triton_utils.triton_to_np_dtype(datatype)).tobytes()
        response.raw_output_contents.append(raw)
    return response


def _datatype(name: str, values: list[Any]) -> str:
    if name == "top_log_probs" or any(isinstance(value, str) for value in values):
        return "BYTES"
    if name.endswith("log_probs"):
        return "FP32"
    return "INT64" if name.endswith("_ns") else "INT32"


class FakeHttpServer(FakeServer):
    """`cut` splits each event into pieces of that many bytes, sent one by one."""

    cut: int | None = None

    def __enter__(self) -> FakeHttpServer:
        fake = self

        class Handler(_Handler):
            server_of = fake

        self._server = _QuietServer(("127.0.0.1", self.port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang.set()
        self._server.shutdown()
        self._thread.join(5)
        self._server.server_close()


class _QuietServer(ThreadingHTTPServer):
    request_queue_size = 128  # many threads may connect at once, on a busy machine

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that hang up are part of the play
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: FakeHttpServer
    timeout = 2  # an idle connection must not hold its thread when the server closes

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        told = self._told()
        self._start(200 if self.path == f"/v2/models/{MODEL}/ready" or told else 400, "application/json")
        if told:
            self._send(json.dumps(told).encode())
        self._end()

    def _told(self) -> dict[str, Any] | None:
        """What the server tells of itself and of its models."""
        if self.path == "/v2":
            return {"name": "triton", "extensions": []}
        name = self.path.removeprefix("/v2/models/")
        if name == self.path or "/" in name:
            return None
        if name not in self.server_of.tensors:
            return {"error": UNKNOWN.format(name)}
        named = [[{"name": each} for each in names] for names in self.server_of.tensors[name]]
        return {"name": name, "versions": ["1"], "inputs": named[0], "outputs": named[1]}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v2/repository/index" and self.server_of.tells_index:
            self._start(200, "application/json")
            self._send(json.dumps([{"name": name} for name in self.server_of.tensors]).encode())
            self._end()
            return
        if not self.path.startswith("/v2/models/"):
            self.send_error(404)
            return
        model, method = self.path.removeprefix("/v2/models/").split("/")
        body.pop("stop_key", None)  # no input: over gRPC it is a parameter
        received = Received(method, model, body.pop("id"), body)
        try:
            self._answer(received)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, received: Received) -> None:
        is_stream = received.method == "generate_stream"
        is_started = False
        for answer in self.server_of.play(received):
            if isinstance(answer, Break):
                self.close_connection = True
                return
            fields = {"error": answer.text} if isinstance(answer, Fail) else _to_fields(answer)
            if not is_started:
                status = answer.status if isinstance(answer, Fail) else 200
                self._start(status, "text/event-stream; charset=utf-8" if is_stream else "application/json")
                is_started = True
            text = json.dumps(fields, ensure_ascii=False)  # as Triton's rapidjson: no \u escapes
            self._send(f"data: {text}\n\n".encode() if is_stream else text.encode())
        if not is_started:
            self._start(200, "text/event-stream; charset=utf-8")
        self._end()

    def _start(self, status: int, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _send(self, data: bytes) -> None:
        size = self.server_of.cut or len(data)
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()

    def _end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()


def _to_fields(answer: dict[str, Any]) -> dict[str, Any]:
    """As Triton writes tensors: one element as such, any other number of them as a list."""
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in answer.items()}


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
