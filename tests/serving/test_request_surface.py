"""Every parameter of a request through the real server.

Those whose effect shows in language have real weights; the others a tiny random model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.clients.api import GenerateRequest, Message
from deepseek_triton.clients.connect import PROTOCOLS, ProtocolName, connect
from deepseek_triton.clients.errors import RequestRejected
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME, SETTINGS, TINY_SMOLLM2
from tests.support.checkpoints import write_tiny
from tests.support.real_tokenizers import smollm2_directory
from tests.support.serving import TIMEOUT_S, metrics, wait_until
from tests.support.waiting import until

pytestmark = pytest.mark.server

CAPITAL = "The capital of France is"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(params=PROTOCOLS)
def client(server: TritonServer, request: pytest.FixtureRequest) -> Iterator[GrpcClient]:
    protocol: ProtocolName = request.param
    url = server.grpc_url if protocol == "grpc" else server.http_url
    with connect(protocol, NAME, url, TIMEOUT_S) as client:
        yield client  # type: ignore[misc]  # one interface


@pytest.fixture(params=PROTOCOLS)
def tiny_client(tiny_server: TritonServer, request: pytest.FixtureRequest) -> Iterator[GrpcClient]:
    protocol: ProtocolName = request.param
    url = tiny_server.grpc_url if protocol == "grpc" else tiny_server.http_url
    with connect(protocol, NAME, url, TIMEOUT_S) as client:
        yield client  # type: ignore[misc]  # one interface


def streamed(client: GrpcClient, request: GenerateRequest) -> str:
    return "".join(chunk.text for chunk in client.stream(request))


def test_a_stop_word_cuts_exactly_and_never_leaks(tiny_client: GrpcClient) -> None:
    whole = tiny_client.generate(GenerateRequest(prompt=CAPITAL, max_tokens=30)).text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 5]  # begins and ends inside tokens
    request = GenerateRequest(prompt=CAPITAL, max_tokens=30, stop_words=["never there", middle])
    for text in (tiny_client.generate(request).text, streamed(tiny_client, request)):
        assert text == whole[: whole.index(middle)]
    assert tiny_client.generate(request).finish_reason == "stop"


def test_a_bad_word_never_comes(client: GrpcClient) -> None:
    assert "Paris" in client.generate(GenerateRequest(prompt=CAPITAL, max_tokens=20)).text
    text = client.generate(GenerateRequest(prompt=CAPITAL, max_tokens=20, bad_words=["Paris", "par"])).text
    assert "Paris" not in text and "par" not in text and len(text) > 20


def test_penalties_and_min_tokens(client: GrpcClient) -> None:
    request: dict[str, Any] = {"prompt": "a b a b a b a b", "max_tokens": 24}
    plain = client.generate(GenerateRequest(**request)).text
    penalised = client.generate(GenerateRequest(**request, frequency_penalty=1.5, repetition_penalty=1.3)).text
    assert len(set(penalised.split())) > len(set(plain.split()))
    chat = [Message("user", "What is the capital of France?")]
    short = client.generate(GenerateRequest(messages=chat, max_tokens=40))
    longer = client.generate(GenerateRequest(messages=chat, max_tokens=40, min_tokens=short.num_output_tokens + 10))
    assert longer.num_output_tokens >= short.num_output_tokens + 10


def test_log_probs_add_up_and_the_greedy_token_is_the_likeliest(tiny_client: GrpcClient) -> None:
    request = GenerateRequest(prompt=CAPITAL, max_tokens=8, return_log_probs=True, num_top_log_probs=3)
    answer = tiny_client.generate(request)
    assert len(answer.log_probs) == len(answer.top_log_probs) == 8
    assert answer.cum_log_prob == pytest.approx(sum(answer.log_probs), abs=1e-3)
    for log_prob, top in zip(answer.log_probs, answer.top_log_probs, strict=True):
        assert top[0].log_prob == pytest.approx(log_prob, abs=1e-4)
        assert [entry.log_prob for entry in top] == sorted((entry.log_prob for entry in top), reverse=True)
        assert sum(math.exp(entry.log_prob) for entry in top) <= 1
    chunks = list(tiny_client.stream(request))
    assert [value for chunk in chunks for value in chunk.log_probs] == pytest.approx(list(answer.log_probs), abs=1e-5)


def test_times_are_in_order(tiny_client: GrpcClient) -> None:
    times = tiny_client.generate(GenerateRequest(prompt=CAPITAL, max_tokens=5, return_perf_metrics=True)).times
    assert times is not None
    assert 0 < times.arrival_ns <= times.first_scheduled_ns < times.first_token_ns < times.last_token_ns


def test_the_prompt_can_come_back(tiny_client: GrpcClient) -> None:
    request: dict[str, Any] = {"prompt": CAPITAL, "max_tokens": 6}
    text = tiny_client.generate(GenerateRequest(**request)).text
    assert tiny_client.generate(GenerateRequest(**request, exclude_input_in_output=False)).text == CAPITAL + text
    assert streamed(tiny_client, GenerateRequest(**request, exclude_input_in_output=False)) == CAPITAL + text


def test_samples_of_one_prompt(tiny_client: GrpcClient) -> None:
    request: dict[str, Any] = {"prompt": "Once upon", "max_tokens": 12, "temperature": 1.0, "seed": 5}
    single = tiny_client.generate(GenerateRequest(**request)).text
    several = tiny_client.generate_all(GenerateRequest(**request, num_return_sequences=4))
    assert several[0].text == single
    assert len({answer.text for answer in several}) == 4
    chunks = list(tiny_client.stream(GenerateRequest(**request, num_return_sequences=4)))
    texts = ["".join(chunk.text for chunk in chunks if chunk.sequence_index == i) for i in range(4)]
    assert texts == [answer.text for answer in several]


def test_a_seed_gives_the_same_text_alone_and_in_a_full_batch(tiny_client: GrpcClient) -> None:
    requests = [
        GenerateRequest(prompt=f"Tell me of {n}", max_tokens=20, temperature=1.2, top_p=0.95, seed=n) for n in range(8)
    ]
    alone = [tiny_client.generate(request).text for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda request: tiny_client.generate(request).text, requests)) == alone
    assert len(set(alone)) == 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_structured_output_is_valid(client: GrpcClient, temperature: float) -> None:
    options: dict[str, Any] = {"max_tokens": 80, "temperature": temperature, "seed": 1}
    chat = [Message("user", "Describe a person as JSON.")]
    answer = client.generate(GenerateRequest(messages=chat, guide_type="json_schema", guide=PERSON, **options))
    person = json.loads(answer.text)
    assert answer.finish_reason == "stop" and set(person) == {"name", "age"} and 0 <= person["age"] <= 99
    choice = client.generate(
        GenerateRequest(prompt="The sky is", guide_type="choice", guide=["blue", "green"], **options)
    )
    assert choice.text in ("blue", "green")
    number = client.generate(GenerateRequest(prompt="2 + 2 =", guide_type="regex", guide=r" [0-9]{1,3}\.", **options))
    assert number.text[0] == " " and number.text[-1] == "." and number.text[1:-1].isdigit()


@pytest.mark.timed
def test_a_bad_guide_is_refused_at_once(client: GrpcClient) -> None:
    for kind, guide in (("json_schema", '{"type": "strange"}'), ("regex", "("), ("choice", "[]"), ("poem", "x")):
        start = time.monotonic()
        with pytest.raises((RequestRejected, ValueError)):
            client.generate(GenerateRequest(prompt="a", guide_type=kind, guide=guide))  # type: ignore[arg-type]
        assert time.monotonic() - start < 5


def test_an_ambiguous_grammar_ends_with_an_error_of_its_own(tiny_client: GrpcClient) -> None:
    grammar = 'start: a "!"\na: a a a a | "x" |'
    dear = GenerateRequest(prompt="a", guide_type="grammar", guide=grammar, bad_words=["!"], max_tokens=400)
    plain = GenerateRequest(prompt="b", max_tokens=40, end_id=-1)
    alone = tiny_client.generate(plain).text
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(tiny_client.generate, dear)
        beside = 0
        while not slow.done():
            assert tiny_client.generate(plain).text == alone
            beside += 1
        with pytest.raises(RequestRejected, match=r"the guide has taken .* s of CPU time for \d+ tokens.*simplify it"):
            slow.result()
    assert beside > 2


def test_a_chat_turn_finds_what_the_turn_before_left(tiny_server: TritonServer, tiny_client: GrpcClient) -> None:
    system = Message("system", "You are a patient teacher of geography who answers in one short sentence. " * 2)
    first = [system, Message("user", "Where is Lyon?")]
    answer = tiny_client.generate(GenerateRequest(messages=first, max_tokens=20))
    second = [*first, Message("assistant", answer.text), Message("user", "And Nice?")]
    wait_until(tiny_server, 60, slots_used=0)
    before = metrics(tiny_server)["prefix_hit_tokens_total"]
    text = tiny_client.generate(GenerateRequest(messages=second, max_tokens=20)).text
    until(lambda: metrics(tiny_server)["prefix_hit_tokens_total"] - before >= answer.num_input_tokens - 1)
    # The same prompt after another one: nothing else can be reused, and the answer is the same.
    assert tiny_client.generate(GenerateRequest(messages=second, max_tokens=20)).text == text


def test_priorities_and_limits_are_checked(client: GrpcClient) -> None:
    with pytest.raises(RequestRejected, match="priority is 7, must be 1"):
        client.generate(GenerateRequest(prompt="a", priority=7))
    with pytest.raises(RequestRejected, match="timed out"):
        client.generate(GenerateRequest(prompt="1 2 3 4 5", timeout_ms=200))
    with pytest.raises(RequestRejected, match="no token <think>"):
        client.generate(GenerateRequest(prompt="a", thinking_token_budget=5))


def test_a_waiting_request_expires_in_the_queue(client: GrpcClient) -> None:
    begun = threading.Semaphore(0)

    def fill(n: int) -> str:
        chunks = client.stream(GenerateRequest(prompt=f"{n} 2 3 4 5 6 7", max_tokens=24))
        first = next(chunks)
        begun.release()
        return [first, *chunks][-1].finish_reason

    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(fill, n) for n in range(8)]
        assert all(begun.acquire(timeout=TIMEOUT_S) for _ in busy)  # every slot is at work
        with pytest.raises(RequestRejected, match="waiting for a slot"):
            client.generate(GenerateRequest(prompt="late", queue_timeout_ms=200))
        assert {future.result() for future in busy} <= {"length", "stop"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text_input": "a", "max_tokns": 3}, "unknown field 'max_tokns'; did you mean max_tokens?"),
        ({"text_input": "a", "xyzzy": "x"}, "unknown field 'xyzzy'"),
        # What docs/requests.md explains: Triton itself refuses these, before any model reads them.
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "Unable to parse JSON bytes array: attempt to access JSON non-string as string",
        ),
        (
            {"text_input": "a", "max_tokens": 1.5},
            "Unable to parse 'data': attempt to access JSON non-signed-integer as signed-integer",
        ),
        (
            {"text_input": "a", "x": [1]},
            "parameter 'x' has invalid type. It should be either 'int', 'bool', or 'string'.",
        ),
    ],
)
def test_a_wrong_field_of_raw_json_is_refused(server: TritonServer, body: dict[str, Any], message: str) -> None:
    response = httpx.post(f"{server.http_url}/v2/models/{NAME}/generate", json=body, timeout=TIMEOUT_S)
    # Triton 2.51 gives some of its own refusals the status 500.
    assert response.status_code == (500 if message.startswith("Unable to parse") else 400)
    assert response.json()["error"].endswith(message)


@pytest.fixture
def long_repository(tmp_path: Path) -> Path:
    """A tiny random model that takes seconds for an answer of thousands of tokens."""
    checkpoint = write_tiny(tmp_path / "checkpoint", **TINY_SMOLLM2 | {"max_position_embeddings": 8192})
    shutil.copytree(smollm2_directory(), checkpoint, dirs_exist_ok=True)
    build(BuildOptions(checkpoint, NAME, tmp_path / "models", max_seq_len=8192, settings=SETTINGS, infer=True))
    return tmp_path / "models"


# The command with shorter waits before it starts the server again: they grow, since no server here lives for long.
SERVE = """
import sys
from deepseek_triton.ensemble.server import backoff
backoff.FIRST_S = 0.1
from deepseek_triton.builders.cli import main
sys.exit(main())
"""


@pytest.mark.timed
def test_a_dead_or_frozen_process_is_an_error_at_once_and_soon_there_is_another(long_repository: Path) -> None:
    """`serve` starts the server again that its watchdog ended."""
    command = [sys.executable, "-u", "-c", SERVE, "serve", str(long_repository)]
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    with subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(line.split()[2] for line in process.stdout if line.startswith("curl")).split("/v2")[0]
            with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client, ThreadPoolExecutor(1) as pool:
                for part, number, reason in (
                    ("engine", signal.SIGKILL, "the engine's process was killed by SIGKILL"),
                    ("detokenizer", signal.SIGSTOP, "the detokenizer's process is stopped by a signal"),
                    ("infer", signal.SIGKILL, "the infer's process was killed by SIGKILL"),
                ):
                    body = {"text_input": "1 2 3 4 5 6", "max_tokens": 8000, "end_id": -1}
                    running = pool.submit(client.post, f"/v2/models/{NAME}/generate", json=body)
                    time.sleep(1.0)
                    assert not running.done()
                    hit = signal_stub(long_repository, part, number)
                    with pytest.raises(httpx.TransportError):
                        running.result(timeout=5)
                    assert time.monotonic() - hit < 2
                    answer = wait_for_answer(client, hit)
                    assert answer.status_code == 200
                    assert reason in next(line for line in process.stdout if "starting it again" in line)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    assert process.returncode == 130


def wait_for_answer(client: httpx.Client, since: float) -> httpx.Response:
    while True:
        try:
            return client.post(f"/v2/models/{NAME}/generate", json={"text_input": "Hi", "max_tokens": 2})
        except httpx.TransportError:
            assert time.monotonic() - since < 30
            time.sleep(0.05)


def signal_stub(repository: Path, part: str, number: int) -> float:
    """Send a signal to the process of one model of `repository`; when, on the monotonic clock."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_part = command[0].endswith(b"stub") and command[1].startswith(bytes(repository / f"{NAME}-{part}"))
        if is_part and b"deepseek_triton.builders.cli" in parent_command(parent_of(directory)):
            os.kill(int(directory.name), number)
            return time.monotonic()
    raise AssertionError(f"no {part} of {repository} runs")


def parent_of(directory: Path) -> Path:
    return Path("/proc") / (directory / "stat").read_text().rpartition(")")[2].split()[1]


def parent_command(server: Path) -> bytes:
    return (parent_of(server) / "cmdline").read_bytes()
