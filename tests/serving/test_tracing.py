"""OpenTelemetry's spans of one request, from the gateway through a real tritonserver, in the test's own collector."""

from __future__ import annotations

import base64
import gzip
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.server.options import tracing_options
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.support.gateway import gateway
from tests.support.tuning import tiny_checkpoint

TRACES = ("0af7651916cd43dd8448eb211c80319c", "0af7651916cd43dd8448eb211c80319d", "0af7651916cd43dd8448eb211c80319e")
PARENT = "b7ad6b7169203331"


@dataclass(frozen=True)
class Span:
    name: str
    trace: str
    id: str
    parent: str


class Collector(ThreadingHTTPServer):
    """Keeps the spans that it is sent, as protobuf by the gateway and as JSON by Triton."""

    request_queue_size = 128  # exporters drop what isn't taken in time

    def __init__(self) -> None:
        self.spans: list[Span] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def wait_for(self, names: set[str], trace: str, limit_s: float = 15) -> dict[str, Span] | None:
        """The spans of a client's trace, or None: an exporter drops what it can't send at once, on a busy machine."""
        until = time.monotonic() + limit_s
        while not names <= (found := {span.name: span for span in self.spans if span.trace == trace}).keys():
            if time.monotonic() > until:
                return None
            time.sleep(0.1)
        return found


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert isinstance(self.server, Collector)
        self.server.spans += _spans(body, is_json="json" in self.headers["content-type"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *values: Any) -> None:
        pass


def _spans(body: bytes, *, is_json: bool) -> Iterator[Span]:
    if not is_json:
        from google.protobuf.json_format import MessageToDict
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        form = MessageToDict(ExportTraceServiceRequest.FromString(body))
    else:
        form = json.loads(body)
    for resource in form["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                ids = [span.get(name, "") for name in ("traceId", "spanId", "parentSpanId")]
                # protobuf's JSON has bytes in base64, OTLP's has these in hexadecimal digits.
                yield Span(span["name"], *(each if is_json else base64.b64decode(each).hex() for each in ids))


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.server
@pytest.mark.skipif(find_spec("pytriton") is None, reason="no tritonserver: pip install --no-deps nvidia-pytriton")
def test_a_clients_trace_goes_through_the_gateway_to_each_model(collector: Collector, tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.sdk")
    build(BuildOptions(tiny_checkpoint(tmp_path), "g", tmp_path / "models", max_seq_len=32))
    options = tracing_options(collector.url)
    with (
        TritonServer(tmp_path / "models", http_port=0, grpc_port=0, metrics_port=0, extra_args=options) as server,
        gateway(backend_urls=(server.grpc_url,), models=("g",), trace_endpoint=collector.url) as url,
    ):
        body = {"model": "g", "prompt": "x", "max_tokens": 3}
        models = {"g", "g-tokenizer", "g-engine", "g-detokenizer"}
        for trace in TRACES:
            headers = {"traceparent": f"00-{trace}-{PARENT}-01"}
            assert httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
            if collector.wait_for({"InferRequest", *models}, trace):
                break
        # The gateway sends the last of its spans when it ends.
    found = collector.wait_for({"POST /v1/completions", "triton g", "InferRequest", *models}, trace)
    assert found is not None, collector.spans
    assert found["POST /v1/completions"].parent == PARENT
    assert found["triton g"].parent == found["POST /v1/completions"].id
    assert found["InferRequest"].parent == found["triton g"].id
    assert found["g"].parent == found["InferRequest"].id
    assert {found[name].parent for name in models - {"g"}} == {found["g"].id}


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://x", "http://", "http://x?y"])
def test_what_is_no_collectors_address_is_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"trace_endpoint must be .*http://localhost:4318"):
        tracing_options(endpoint)
