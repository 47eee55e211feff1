"""A server that answers as Triton does, when and how it is told: known times for a load generator to measure.

It is a process of its own, so that neither its threads nor its work are in the way of the one that measures:

    python -m tests.support.fake_triton '{"first_s": 0.1, "gap_s": 0.01, "num_tokens": 5, "behaviour": "answer"}'

prints its ports as JSON. Behaviours: answer; stall: takes requests and says nothing; refuse: an error for each; breaks:
ends a stream after half its tokens, without a finish_reason.
"""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

MODEL = "fake"
NUM_INPUT_TOKENS = 3
STALL_S = 3600.0
METRICS = """# TYPE nv_inference_request_success counter
nv_inference_request_success{{model="fake",version="1"}} {successes}
# TYPE nv_inference_count counter
nv_inference_count{{model="fake",version="1"}} {successes}
"""


@dataclass(frozen=True)
class Behaviour:
    first_s: float = 0.1
    gap_s: float = 0.01
    num_tokens: int = 5
    behaviour: str = "answer"


@dataclass(frozen=True)
class Ports:
    http: int
    grpc: int


@contextlib.contextmanager
def fake_triton(behaviour: Behaviour) -> Iterator[Ports]:
    """Start one, and stop it."""
    command = [sys.executable, "-m", "tests.support.fake_triton", json.dumps(asdict(behaviour))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        assert process.stdout is not None
        yield Ports(**json.loads(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


class Answers:
    """The responses of one model, in time."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._lock = threading.Lock()
        self.successes = 0

    def whole(self, stream: bool) -> Iterator[dict[str, Any]]:
        """One response's outputs after another, at their moments."""
        told = self._behaviour
        start = time.perf_counter()
        if told.behaviour == "stall":
            time.sleep(STALL_S)
        if told.behaviour == "refuse":
            raise RuntimeError("the fake refuses")
        last = told.num_tokens // 2 if told.behaviour == "breaks" else told.num_tokens
        for i in range(1, last + 1):
            due = start + told.first_s + told.gap_s * (i - 1)
            time.sleep(max(due - time.perf_counter(), 0))
            is_last = i == told.num_tokens
            if is_last:
                with self._lock:
                    self.successes += 1
            if stream or is_last:
                yield {
                    "text_output": "word " if stream else "word " * i,
                    "finish_reason": "length" if is_last else "",
                    "num_input_tokens": NUM_INPUT_TOKENS,
                    "num_output_tokens": i,
                }


class GrpcServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        request = next(requests)
        if request.model_name != MODEL:  # a request to stop
            return
        raw = dict(zip((each.name for each in request.inputs), request.raw_input_contents, strict=True))
        try:
            for outputs in self._answers.whole(stream=raw["stream"] == b"\x01"):
                response = service_pb2.ModelInferResponse(model_name=MODEL)
                for name, value in outputs.items():
                    is_text = isinstance(value, str)
                    response.outputs.add(name=name, datatype="BYTES" if is_text else "INT32", shape=[1, 1])
                    data = value.encode() if is_text else b""
                    packed = struct.pack("<I", len(data)) + data if is_text else struct.pack("<i", value)
                    response.raw_output_contents.append(packed)
                yield service_pb2.ModelStreamInferResponse(infer_response=response)
        except RuntimeError as error:
            yield service_pb2.ModelStreamInferResponse(error_message=str(error))


def make_handler(answers: Answers) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = METRICS.format(successes=answers.successes) if self.path == "/metrics" else ""
            self._send(200, "text/plain", text)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if f"/models/{MODEL}/" not in self.path:
                self._send(200, "application/json", "{}")
                return
            stream = self.path.endswith("generate_stream")
            try:
                if not stream:
                    outputs = list(answers.whole(stream=False))
                    self._send(200, "application/json", json.dumps(outputs[0] if outputs else {}))
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for each in answers.whole(stream=True):
                    self.wfile.write(f"data: {json.dumps(each)}\n\n".encode())
                    self.wfile.flush()
            except RuntimeError as error:
                if stream:
                    self.wfile.write(f"data: {json.dumps({'error': str(error)})}\n\n".encode())
                else:
                    self._send(400, "application/json", json.dumps({"error": str(error)}))

        def _send(self, status: int, kind: str, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def main() -> None:
    answers = Answers(Behaviour(**json.loads(sys.argv[1])))
    http = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(answers))
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    server = grpc.server(ThreadPoolExecutor(64))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(GrpcServicer(answers), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(json.dumps(asdict(Ports(http.server_address[1], port))), flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
