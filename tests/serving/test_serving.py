"""The whole way through a real tritonserver, with the project's own clients, and real weights but for a few tests."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek_triton.clients.api import GenerateRequest, Message
from deepseek_triton.clients.connect import PROTOCOLS, ProtocolName, connect
from deepseek_triton.clients.errors import RequestRejected
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.protocol.progress import Progress
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import MAX_SEQ_LEN, NAME

pytestmark = pytest.mark.server

TIMEOUT_S = 120.0
MAX_NUM_SEQS = 8
CAPITAL = GenerateRequest(messages=[Message("user", "What is the capital of France?")], max_tokens=40)
SUBJECTS = (
    "rivers",
    "a cat called Tom",
    "the sea",
    "def fibonacci(n):",
    "巴黎",
    "🚀 rockets",
    "prime numbers",
    "bread",
)


@pytest.fixture
def client(server: TritonServer) -> Iterator[GrpcClient]:
    with GrpcClient(server.grpc_url, NAME, TIMEOUT_S) as client:
        yield client


@pytest.fixture
def tiny_client(tiny_server: TritonServer) -> Iterator[GrpcClient]:
    with GrpcClient(tiny_server.grpc_url, NAME, TIMEOUT_S) as client:
        yield client


def url_of(server: TritonServer, protocol: ProtocolName) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


def stream_text(client: Any, request: GenerateRequest) -> str:
    return "".join(chunk.text for chunk in client.stream(request))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_model_answers_streamed_and_not(server: TritonServer, protocol: ProtocolName) -> None:
    with connect(protocol, NAME, url_of(server, protocol), TIMEOUT_S) as client:
        assert client.is_ready()
        assert client.max_seq_len() == MAX_SEQ_LEN
        generation = client.generate(CAPITAL)
        chunks = list(client.stream(CAPITAL))
    assert generation.text == "The capital of France is Paris."
    assert generation.finish_reason == "stop"
    assert (generation.num_input_tokens, generation.num_output_tokens) == (37, 7)
    assert "".join(chunk.text for chunk in chunks) == generation.text
    assert len(chunks) > 3, "a stream that comes in one piece is none"
    assert [chunk.finish_reason for chunk in chunks] == [""] * (len(chunks) - 1) + ["stop"]


@pytest.mark.parametrize(
    "prompt", ["请用中文介绍北京", "Emojis: 😀 👩‍👩‍👧‍👦 🇫🇷", "for i in range(3):\n    print(i)\n\n\tif"]
)
def test_a_stream_joins_to_the_text_of_one_response(tiny_client: GrpcClient, prompt: str) -> None:
    # A high temperature makes tokens that are parts of characters.
    request = GenerateRequest(prompt=prompt, max_tokens=60, temperature=1.8, seed=11)
    text = tiny_client.generate(request).text
    assert stream_text(tiny_client, request) == text
    assert len(text) > 20


def test_sixteen_streams_at_once_give_what_each_gives_alone(tiny_client: GrpcClient) -> None:
    requests = [
        GenerateRequest(prompt=f"A short text about {subject}. " * (1 + i % 5), max_tokens=6 + i)
        for i, subject in enumerate(SUBJECTS * 2)
    ]
    alone = [stream_text(tiny_client, request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: stream_text(tiny_client, request), requests))
    assert together == alone
    assert len(set(alone)) == len(alone)


def test_the_seed_decides_a_sampled_text(tiny_client: GrpcClient) -> None:
    def text(seed: int) -> str:
        return tiny_client.generate(
            GenerateRequest(prompt="Once", max_tokens=20, temperature=1.0, top_p=0.95, seed=seed)
        ).text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_max_tokens_and_the_context_limit_end_a_text(tiny_client: GrpcClient) -> None:
    short = tiny_client.generate(GenerateRequest(prompt="One two three", max_tokens=5))
    assert (short.finish_reason, short.num_output_tokens) == ("length", 5)
    # Nonsense goes on and on: only the context's end stops it.
    long = tiny_client.generate(GenerateRequest(prompt=" ".join(str(n) for n in range(90)), max_tokens=100_000))
    assert long.finish_reason == "length"
    assert long.num_input_tokens + long.num_output_tokens == MAX_SEQ_LEN


@pytest.mark.timed
def test_a_killed_client_frees_its_slots(server: TritonServer, client: GrpcClient) -> None:
    program = f"""
import os, threading
from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.grpc import GrpcClient
client = GrpcClient({server.grpc_url!r}, {NAME!r})
request = GenerateRequest(prompt="1 2 3 4 5 6 7 8", max_tokens=480)
def run():
    for chunk in client.stream(request):
        os.write(1, b"chunk\\n")  # one call: print's threads mix their line ends
for _ in range({MAX_NUM_SEQS}):
    threading.Thread(target=run).start()
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for _ in range(3 * MAX_NUM_SEQS):  # every slot is at work
            assert process.stdout.readline() == "chunk\n"
    finally:
        process.kill()
        process.communicate()
    start = time.monotonic()
    generation = client.generate(CAPITAL)
    assert generation.text == "The capital of France is Paris."
    # Eight texts of 480 tokens take over 20 s here; a slot that is freed within a second leaves no such wait.
    assert time.monotonic() - start < 8


@pytest.mark.timed
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_closed_stream_stops_the_work_on_the_server(
    server: TritonServer, client: GrpcClient, protocol: ProtocolName
) -> None:
    with connect(protocol, NAME, url_of(server, protocol), TIMEOUT_S) as leaving:
        for _ in range(2 * MAX_NUM_SEQS):  # twice as many as there are slots: none may be left behind
            with closing(leaving.stream(GenerateRequest(prompt="1 2 3 4 5 6", max_tokens=480))) as stream:
                next(stream)
    start = time.monotonic()
    client.generate(CAPITAL)
    assert time.monotonic() - start < 8


@pytest.mark.timed
def test_ctrl_c_in_the_terminal_stops_the_work_on_the_server(server: TritonServer, client: GrpcClient) -> None:
    command = [
        sys.executable,
        "-m",
        "deepseek_triton.builders.cli",
        "generate",
        NAME,
        "1 2 3 4 5 6 7",
        "--url",
        server.grpc_url,
    ]
    processes = [
        subprocess.Popen([*command, "--max-tokens", "480"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(MAX_NUM_SEQS)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.read(5)
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        process.communicate(timeout=20)
        assert process.returncode == 130
    start = time.monotonic()
    client.generate(CAPITAL)
    assert time.monotonic() - start < 8


LONG = "word " * (MAX_SEQ_LEN + 50)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text_input": LONG}, r"the prompt has \d+ tokens, the context holds 512"),
        ({"text_input": ""}, "text_input is empty"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": "a", "max_tokens": -5}, "max_tokens is -5"),
        ({"text_input": "a", "temperature": -1.0}, "temperature is -1"),
        ({"text_input": "a", "top_p": -0.1}, "top_p is -0.1"),  # 0 means that it isn't set, as NVIDIA's clients mean it
        ({"text_input": "a", "top_p": 1.5}, "top_p is 1.5"),
        ({"text_input": "a", "top_k": -1}, "top_k is -1"),
        ({"text_input": "a", "messages": "[]"}, "either text_input or messages"),
        ({"messages": "[]"}, "messages"),
        ({"messages": "not json"}, "messages"),
        ({"messages": '[{"role": "user"}]'}, "content"),
        ({"text_input": ["a"] * 65}, "batch-size must be <= 64"),
        ({}, "0 inputs"),
    ],
)
@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_bad_requests_are_told_what_is_wrong(
    server: TritonServer, inputs: dict[str, Any], message: str, endpoint: str
) -> None:
    response = httpx.post(f"{server.http_url}/v2/models/{NAME}/{endpoint}", json=inputs, timeout=TIMEOUT_S)
    assert response.status_code == 400
    error = json.loads(response.text.removeprefix("data: "))["error"]
    assert re.search(message, error), error
    assert "\n" not in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "datatype", "raw", "message"),
    [
        ("temperature", "FP32", b"\x00\x00\xc0\x7f", "temperature is nan"),
        ("text_input", "BYTES", b"\x02\x00\x00\x00\xff\xfe", "text_input is not UTF-8"),
        ("max_tokens", "INT64", b"\x00" * 8, "data-type"),
    ],
)
def test_bad_tensors_over_grpc_are_told_what_is_wrong(
    server: TritonServer, name: str, datatype: str, raw: bytes, message: str
) -> None:
    tensors = {"text_input": ("BYTES", b"\x01\x00\x00\x00a"), name: (datatype, raw)}
    request = service_pb2.ModelInferRequest(model_name=NAME)
    for tensor, (kind, value) in tensors.items():
        request.inputs.add(name=tensor, datatype=kind, shape=(1, 1))
        request.raw_input_contents.append(value)
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (response,) = stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S)
    assert message in response.error_message


def test_errors_disturb_no_other_stream(tiny_client: GrpcClient) -> None:
    request = GenerateRequest(prompt="A long story about a river:", max_tokens=400)
    expected = stream_text(tiny_client, request)

    def fail() -> None:
        with pytest.raises(RequestRejected):
            tiny_client.generate(GenerateRequest(prompt=LONG))

    with ThreadPoolExecutor(4) as pool:
        text = pool.submit(stream_text, tiny_client, request)
        for _ in range(10):
            pool.submit(fail).result()
        assert text.result() == expected


def test_the_load_line_says_what_the_memory_is_for(server: TritonServer) -> None:
    per_token = 30 * 2 * 3 * 64 * 4
    size = MAX_NUM_SEQS * MAX_SEQ_LEN * per_token // 2**20
    assert f"KV cache: 8 slots x 512 tokens x {per_token} bytes = {size} MiB" in server.log_path.read_text()


@pytest.mark.timed
def test_the_engine_can_be_called_directly_and_a_gone_caller_is_noticed(
    server: TritonServer, client: GrpcClient
) -> None:
    # There is no detokenizer, so nothing is acknowledged; the stream must not count as abandoned.
    body = {"input_ids": [1, 2, 3, 4], "stream": True, "max_tokens": 60}
    url = f"{server.http_url}/v2/models/{NAME}-engine/generate_stream"
    with httpx.stream("POST", url, json=body, timeout=TIMEOUT_S) as response:
        lines = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    progress = [Progress.from_json(line["progress"], []) for line in lines]
    assert progress[-1].updates[-1].finish_reason in ("length", "stop")
    with httpx.stream("POST", url, json={**body, "max_tokens": 480}, timeout=TIMEOUT_S) as response:
        next(response.iter_lines())
    start = time.monotonic()
    client.generate(CAPITAL)
    assert time.monotonic() - start < 8
