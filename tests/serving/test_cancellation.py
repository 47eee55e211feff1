"""Everything that ends a request before its time, through the real server: the slot is free within a second, and the
streams beside it don't notice."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2_grpc

from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME
from tests.support.serving import PUBLISH_S, TIMEOUT_S, infer_request, metrics, wait_until

pytestmark = [pytest.mark.server, pytest.mark.timed]

BESIDE = GenerateRequest(prompt="A short text about the sea:", max_tokens=100)
LONG = "1 2 3 4 5 6 7 8"  # counting goes on to the context's end
# cancel_after_s, plus an allowance for a step, the machine's load and the metrics' interval.
LIMIT_S = 1.0 + PUBLISH_S + 0.75


@contextmanager
def stream_beside(server: TritonServer) -> Iterator[None]:
    """A stream that runs meanwhile and must come out whole."""
    texts: list[str] = []

    def run() -> None:
        with GrpcClient(server.grpc_url, NAME, TIMEOUT_S) as client:
            texts.append("".join(chunk.text for chunk in client.stream(BESIDE)))

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(server, 60, slots_used=1)
    yield
    thread.join()
    assert texts == [text_alone(server.grpc_url)]


@cache
def text_alone(url: str) -> str:
    """What the server answers when nothing happens: it is greedy, so once is enough."""
    with GrpcClient(url, NAME, TIMEOUT_S) as client:
        return client.generate(BESIDE).text


@pytest.fixture
def beside(server: TritonServer) -> Iterator[None]:
    with stream_beside(server):
        yield


@contextmanager
def one_more_is_cancelled(server: TritonServer, limit_s: float = LIMIT_S) -> Iterator[None]:
    """What happens inside makes a second request run, and then lose its client."""
    cancelled = metrics(server)["requests_cancelled_total"]
    yield
    took = wait_until(server, limit_s, requests_cancelled_total=cancelled + 1, slots_at_most=1)
    print(f"the slot was free after {took:.2f} s")


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_grpc_cancel(server: TritonServer, beside: None, is_streamed: bool) -> None:
    with grpc.insecure_channel(server.grpc_url) as channel, one_more_is_cancelled(server):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(iter([infer_request(text_input=LONG, stream=is_streamed)]), timeout=TIMEOUT_S)
        if is_streamed:
            next(call)
        wait_until(server, 60, slots_used=2)
        call.cancel()


@pytest.mark.parametrize("is_streamed", [True, False])
def test_an_explicit_stop(server: TritonServer, beside: None, is_streamed: bool) -> None:
    answers: list[httpx.Response] = []
    endpoint = "generate_stream" if is_streamed else "generate"
    body = {"id": "stop-me", "stop_key": "secret", "text_input": LONG, "stream": is_streamed}

    def run() -> None:
        answers.append(httpx.post(f"{server.http_url}/v2/models/{NAME}/{endpoint}", json=body, timeout=TIMEOUT_S))

    thread = threading.Thread(target=run)
    with one_more_is_cancelled(server):
        thread.start()
        wait_until(server, 60, slots_used=2)
        engine = f"{server.http_url}/v2/models/{NAME}-engine/generate"
        for key in ({}, {"stop_key": "guess"}, {"stop_key": "secret"}):
            assert thread.is_alive(), "whoever doesn't know the key stops nothing"
            assert httpx.post(engine, json={"id": "stop-me", "stop": True, **key}, timeout=5).status_code == 200
    thread.join(10)
    assert '"finish_reason":"cancelled"' in answers[0].text


def test_a_closed_http_stream(server: TritonServer, beside: None) -> None:
    url, body = f"{server.http_url}/v2/models/{NAME}/generate_stream", {"text_input": LONG, "stream": True}
    with one_more_is_cancelled(server), httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as response:
        next(response.iter_bytes())
        wait_until(server, 60, slots_used=2)


PROGRAM = """
import sys
from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.connect import connect
protocol, url, is_streamed = sys.argv[1:]
with connect(protocol, {name!r}, url) as client:
    print("ready", client.is_ready(), flush=True)
    sys.stdin.readline()
    request = GenerateRequest(prompt={prompt!r})
    if is_streamed == "streamed":
        for chunk in client.stream(request):
            print("chunk", flush=True)
    else:
        client.generate(request)
"""


@contextmanager
def client_process(server: TritonServer, protocol: str, kind: str) -> Iterator[subprocess.Popen[str]]:
    """Another process whose request runs, and a stream beside it."""
    url = server.grpc_url if protocol == "grpc" else server.http_url
    program = PROGRAM.format(name=NAME, prompt=LONG)
    process = subprocess.Popen(
        [sys.executable, "-c", program, protocol, url, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready True\n"  # starting may take long: the stream must not end meanwhile
        with stream_beside(server):
            process.stdin.write("go\n")
            process.stdin.flush()
            wait_until(server, 60, slots_used=2)
            yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("protocol", "kind"), [("grpc", "streamed"), ("grpc", "whole"), ("http", "streamed")])
def test_a_killed_client(server: TritonServer, protocol: str, kind: str) -> None:
    with client_process(server, protocol, kind) as process, one_more_is_cancelled(server):
        process.send_signal(signal.SIGKILL)


def test_a_grpc_client_that_is_frozen(server: TritonServer) -> None:
    # It answers no ping: the server closes its connection (ensemble/server/tritonserver.py's KEEPALIVE_OPTIONS: a ping
    # after a second without traffic, a second for its answer).
    with client_process(server, "grpc", "streamed") as process, one_more_is_cancelled(server, LIMIT_S + 2.0):
        process.send_signal(signal.SIGSTOP)


def test_an_http_client_that_hangs_up_on_generate_is_found_by_the_time_limit(
    server: TritonServer, beside: None
) -> None:
    """Triton 2.51 checks the connection only when it has an answer: the request's time limit ends it."""
    expired = metrics(server)["requests_expired_total"]
    body = {"text_input": LONG, "timeout_ms": 1500}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.http_url}/v2/models/{NAME}/generate", json=body, timeout=0.5)
    wait_until(server, 1.0 + LIMIT_S, requests_expired_total=expired + 1, slots_at_most=1)


def test_a_client_that_reads_no_more_is_found_by_the_time_limit(server: TritonServer, beside: None) -> None:
    """The system's buffers accept what is sent, so the server can't see that the client doesn't read."""
    expired = metrics(server)["requests_expired_total"]
    body = {"text_input": LONG, "stream": True, "timeout_ms": 1500}
    url = f"{server.http_url}/v2/models/{NAME}/generate_stream"
    with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as response:
        pieces = response.iter_bytes()  # kept, for an iterator that goes away closes the connection
        next(pieces)
        wait_until(server, 1.5 + LIMIT_S, requests_expired_total=expired + 1, slots_at_most=1)
