"""What holds for every client: each test runs over gRPC and over HTTP, synchronously and with asyncio."""

from __future__ import annotations

import json
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import cast

import pytest

from deepseek_triton.clients.api import Chunk, Client, GenerateRequest, Generation, Message, Times, ToolCall, TopLogProb
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.connect import PROTOCOLS, ProtocolName, connect, connect_async
from deepseek_triton.clients.errors import (
    ClientError,
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerUnavailable,
)
from deepseek_triton.ensemble.protocol import contract
from tests.clients.test_fakes import (
    MODEL,
    Break,
    Fail,
    FakeGrpcServer,
    FakeHttpServer,
    FakeServer,
    Received,
    Reply,
    Script,
    reply,
    rows,
    say,
)
from tests.support.blocking import Blocking

REQUEST = GenerateRequest(prompt="Hello")


class World:
    """One kind of client: starts fake servers and clients, and closes them after the test."""

    def __init__(self, protocol: ProtocolName, *, is_async: bool) -> None:
        self.protocol = protocol
        self._is_async = is_async
        self._open = ExitStack()

    def serve(self, script: Script, on_stop: Fail | None = None) -> FakeServer:
        kind: type[FakeServer] = FakeGrpcServer if self.protocol == "grpc" else FakeHttpServer
        server = self._open.enter_context(kind(script, on_stop))
        return server

    def client(self, url: str, timeout_s: float = 10.0) -> BaseClient:
        return self._open.enter_context(self.connect(MODEL, url, timeout_s))

    def connect(self, model: str, url: str, timeout_s: float = 10.0) -> BaseClient:
        """A client that the caller closes."""
        if not self._is_async:
            return connect(self.protocol, model, url, timeout_s)
        client = Blocking(connect_async(self.protocol, model, url, timeout_s))
        self._open.callback(client.end)
        return cast(BaseClient, client)

    def start(self, script: Script, timeout_s: float = 10.0) -> tuple[FakeServer, BaseClient]:
        server = self.serve(script)
        return server, self.client(server.url, timeout_s)

    def close(self) -> None:
        self._open.close()


KINDS = [(protocol, is_async) for is_async in (False, True) for protocol in PROTOCOLS]


@pytest.fixture(params=KINDS, ids=lambda kind: kind[0] + ("-async" if kind[1] else ""))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    protocol, is_async = request.param
    world = World(protocol, is_async=is_async)
    yield world
    world.close()


def hang_after(server_of: list[FakeServer], *texts: str) -> Script:
    """Answer with `texts`, without an end, until the test is over."""

    def script(received: Received) -> Iterator[Reply]:
        for text in texts:
            yield reply(text)
        server_of[0].wait_for_stop(10)

    return script


def start_hanging(world: World, *texts: str, timeout_s: float = 10.0) -> tuple[FakeServer, BaseClient]:
    server_of: list[FakeServer] = []
    server, client = world.start(hang_after(server_of, *texts), timeout_s)
    server_of.append(server)
    return server, client


def test_stream_gives_each_chunk(world: World) -> None:
    server, client = world.start(say("Paris ", "is ", "it 🗼", finish_reason="length"))
    interface: Client = client
    assert list(interface.stream(REQUEST)) == [
        Chunk("Paris ", "", 3, 1),
        Chunk("is ", "", 3, 2),
        Chunk("it 🗼", "length", 3, 3),
    ]
    (received,) = server.generated
    assert received.inputs == {"text_input": "Hello", "stream": True}
    assert received.method in ("ModelStreamInfer", "generate_stream")
    assert len(received.request_id) == 32
    assert server.stopped == []


def test_generate_gives_the_whole_answer(world: World) -> None:
    server, client = world.start(say("Paris ", "is ", "it"))
    assert client.generate(REQUEST) == Generation("Paris is it", "stop", 3, 3)
    (received,) = server.generated
    assert received.inputs["stream"] is False
    assert received.method in ("ModelStreamInfer", "generate")


def test_the_engine_tells_its_context(world: World) -> None:
    server, client = world.start(say("x"))
    assert client.max_seq_len() == 256
    server.max_seq_len = None
    with pytest.raises(RequestRejected, match="no input describe"):
        client.max_seq_len()


def test_every_request_has_its_own_id(world: World) -> None:
    server, client = world.start(say("x"))
    for _ in range(3):
        client.generate(REQUEST)
    assert len({received.request_id for received in server.generated}) == 3


def test_options_arrive_as_they_were_given(world: World) -> None:
    server, client = world.start(say("x"))
    client.generate(
        GenerateRequest(
            messages=[Message("system", "Be «short»"), Message("user", "2028:\u2028 \x00 🗼")],
            max_tokens=2**31 - 1,
            temperature=0,
            top_k=0,
            top_p=0.5,
            seed=2**64 - 1,
            presence_penalty=-1,
            stop_words=["\n\n", "🗼"],
            bad_words=["one"],
            num_top_log_probs=2,
            enable_thinking=False,
            exclude_input_in_output=False,
            guide_type="choice",
            guide=["a", "b"],
            timeout_ms=5,
        )
    )
    inputs = dict(server.generated[0].inputs)
    assert json.loads(inputs.pop("messages"))["messages"] == [
        {"role": "system", "content": "Be «short»"},
        {"role": "user", "content": "2028:\u2028 \x00 🗼"},
    ]
    assert inputs == {
        "stream": False,
        "max_tokens": 2**31 - 1,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 0.5,
        "seed": 2**64 - 1,
        "presence_penalty": -1.0,
        "stop_words": ["\n\n", "🗼"],
        "bad_words": ["one"],
        "num_top_log_probs": 2,
        "enable_thinking": False,
        "exclude_input_in_output": False,
        "guided_decoding_guide_type": "choice",
        "guided_decoding_guide": '["a", "b"]',
        "timeout_ms": 5,
    }


def test_outputs_arrive_as_they_were_sent(world: World) -> None:
    """Of every dtype, with no element, one, and several."""
    top = '[{"id": 1, "token": "é", "log_prob": -0.25}]'
    call = '[{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]'
    times = {spec.name: 2**53 + i for i, spec in enumerate(contract.TIME_OUTPUTS, start=1)}
    more = {"reasoning_output": "hm", "tool_calls": call, "cum_log_probs": -0.75, **times}
    replies: list[Reply] = [
        reply("a", "", 1, output_log_probs=[-0.25], top_log_probs=[top], **more),
        reply("b", "", 3, output_log_probs=[-0.25, -math.inf], top_log_probs=[top, "[]"], **more),
        reply("", "stop", 3, output_log_probs=[], top_log_probs=[], **more),
    ]
    _, client = world.start(lambda received: iter(replies))
    chunks = list(client.stream(REQUEST))
    assert [chunk.log_probs for chunk in chunks] == [(-0.25,), (-0.25, -math.inf), ()]
    likeliest = (TopLogProb(1, "é", -0.25),)
    assert [chunk.top_log_probs for chunk in chunks] == [(likeliest,), (likeliest, ()), ()]
    for chunk in chunks:
        assert (chunk.reasoning, chunk.tool_calls, chunk.cum_log_prob, chunk.times) == (
            "hm",
            (ToolCall(0, "c", "f", "{}"),),
            -0.75,
            Times(*times.values()),
        )


def two_answers(received: Received) -> Iterator[Reply]:
    """Two sequences whose responses tell of one or of both."""
    assert received.inputs["num_return_sequences"] == 2
    if not received.inputs["stream"]:
        yield rows(
            reply("Rome", "length", 2, sequence_index=1, output_log_probs=[-2, -3]),
            reply("Paris", "stop", 1, sequence_index=0, output_log_probs=[-1]),
        )
        return
    yield rows(
        reply("Par", "", 1, sequence_index=0, output_log_probs=[-1]),
        reply("Ro", "", 1, sequence_index=1, output_log_probs=[-2]),
    )
    yield reply("is", "stop", 1, sequence_index=0, output_log_probs=[])
    yield reply("me", "length", 2, sequence_index=1, output_log_probs=[-3])


def test_several_answers_to_one_prompt(world: World) -> None:
    server, client = world.start(two_answers)
    request = replace(REQUEST, num_return_sequences=2)
    expected = (
        Generation("Paris", "stop", 3, 1, sequence_index=0, log_probs=(-1,)),
        Generation("Rome", "length", 3, 2, sequence_index=1, log_probs=(-2, -3)),
    )
    assert client.generate_all(request) == expected
    chunks = list(client.stream(request))
    assert [(chunk.sequence_index, chunk.text) for chunk in chunks] == [(0, "Par"), (1, "Ro"), (0, "is"), (1, "me")]
    assert Generation.all_from_chunks(chunks) == expected
    assert server.stopped == []


def test_several_answers_may_come_in_a_response_each(world: World) -> None:
    def apart(received: Received) -> Iterator[Reply]:
        yield reply("Rome", "length", 2, sequence_index=1)
        yield reply("Paris", "stop", 1, sequence_index=0)

    if world.protocol == "http":
        pytest.skip("Triton's HTTP generate gives one response")
    _, client = world.start(apart)
    answers = client.generate_all(replace(REQUEST, num_return_sequences=2))
    assert [answer.text for answer in answers] == ["Paris", "Rome"]


def test_generate_refuses_several_answers(world: World) -> None:
    server, client = world.start(two_answers)
    with pytest.raises(ValueError, match="num_return_sequences must be 1 for generate, got 2; generate_all"):
        client.generate(replace(REQUEST, num_return_sequences=2))
    assert server.generated == []


def test_a_stream_is_over_with_its_last_sequence(world: World) -> None:
    server, client = world.start(two_answers)
    request = replace(REQUEST, num_return_sequences=2)
    with closing(client.stream(request)) as stream:
        for chunk in stream:
            if chunk.finish_reason:
                break
    assert chunk.text == "is"
    assert server.stopped == [server.generated[0].request_id]


def test_a_sequence_that_never_ends_is_missed(world: World) -> None:
    _, client = world.start(lambda received: iter([reply("Par", "stop", sequence_index=1)]))
    with pytest.raises(ProtocolError, match="without a finish_reason"):
        client.generate_all(replace(REQUEST, num_return_sequences=2))


def test_the_callers_id_is_the_requests(world: World) -> None:
    server, client = world.start(say("x"))
    client.generate(REQUEST, request_id="mine é")
    list(client.stream(REQUEST, request_id="mine, too"))
    assert [received.request_id for received in server.generated] == ["mine é", "mine, too"]
    for wrong in ("", "\udce9", 7):
        with pytest.raises(ValueError, match="request_id must"):
            client.stream(REQUEST, request_id=wrong)  # type: ignore[arg-type]


def test_another_client_stops_a_request(world: World) -> None:
    def script(received: Received) -> Iterator[Reply]:
        yield reply("Par")
        server.wait_for_stop(10)
        yield reply("", "cancelled")

    server, client = world.start(script)
    stream = client.stream(REQUEST, request_id="mine")
    assert next(stream).text == "Par"
    world.client(server.url).stop("mine")
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    assert server.stopped == ["mine"]


def test_a_stop_needs_an_id(world: World) -> None:
    server, client = world.start(say("x"))
    for wrong in ("", None):
        with pytest.raises(ValueError, match="request_id must"):
            client.stop(wrong)  # type: ignore[arg-type]
    assert server.stopped == []


def test_a_stop_that_fails_says_so(world: World) -> None:
    server = world.serve(say("x"), on_stop=Fail("unknown model: tiny-engine"))
    with pytest.raises(RequestRejected, match="unknown model: tiny-engine"):
        world.client(server.url).stop("mine")


@pytest.mark.parametrize("status", [400, 500, 503])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_instead_of_an_answer(world: World, stream: bool, status: int) -> None:
    server, client = world.start(lambda received: iter([Fail("prompt has 9 tokens, at most 8", status)]))
    with pytest.raises(RequestRejected, match=r"^prompt has 9 tokens, at most 8$"):
        if stream:
            list(client.stream(REQUEST))
        else:
            client.generate(REQUEST)
    assert server.stopped == []  # the server ended it by itself


def test_an_error_inside_a_stream(world: World) -> None:
    server, client = world.start(lambda received: iter([reply("Par"), Fail("out of slots")]))
    stream = client.stream(REQUEST)
    assert next(stream).text == "Par"
    with pytest.raises(RequestRejected, match=r"^out of slots$"):
        next(stream)
    assert server.stopped == []


BROKEN: dict[str, list[Reply]] = {
    "without a finish_reason": [reply("Par")],
    "after the one with": [reply("Par", "stop"), reply("is")],
    "num_input_tokens": [{"text_output": "x", "finish_reason": "stop", "num_output_tokens": 1}],
    "text_output": [{**reply("", "stop"), "text_output": 7}],
    "num_output_tokens": [{**reply("", "stop"), "num_output_tokens": "many"}],
    "got 'tired'": [reply("Par", "tired")],
}


@pytest.mark.parametrize("message", BROKEN)
def test_an_answer_that_breaks_the_contract(world: World, message: str) -> None:
    _, client = world.start(lambda received: iter(BROKEN[message]))
    with pytest.raises(ProtocolError, match=message):
        list(client.stream(REQUEST))


def test_no_answer_at_all(world: World) -> None:
    _, client = world.start(lambda received: iter([]))
    with pytest.raises(ProtocolError):
        list(client.stream(REQUEST))


def test_outputs_beyond_the_contract_are_ignored(world: World) -> None:
    _, client = world.start(lambda received: iter([{**reply("x", "stop"), "queue_len": 4}]))
    assert client.generate(REQUEST).text == "x"


def test_nothing_listens(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = world.client(f"127.0.0.1:{port}" if world.protocol == "grpc" else f"http://127.0.0.1:{port}")
    with pytest.raises(ServerUnavailable, match=f"127.0.0.1:{port}"):
        client.generate(REQUEST)
    assert not client.is_ready()


def test_the_connection_breaks_midway(world: World) -> None:
    _, client = world.start(lambda received: iter([reply("Par"), Break()]))
    stream = client.stream(REQUEST)
    assert next(stream).text == "Par"
    with pytest.raises(ServerUnavailable):
        next(stream)


@pytest.mark.slow
@pytest.mark.parametrize("texts", [(), ("Par",)])
def test_a_stream_that_falls_silent_times_out_and_is_stopped(world: World, texts: tuple[str, ...]) -> None:
    server, client = start_hanging(world, *texts, timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(RequestTimeout, match=r"within 0.3 s"):
        list(client.stream(REQUEST))
    assert 0.25 < time.monotonic() - started < 10
    assert server.stopped == [server.generated[0].request_id]


@pytest.mark.slow
def test_generate_times_out_and_is_stopped(world: World) -> None:
    server, client = start_hanging(world, timeout_s=0.3)
    with pytest.raises(RequestTimeout):
        client.generate(REQUEST)
    assert server.stopped == [server.generated[0].request_id]


@pytest.mark.slow
def test_timeout_bounds_the_whole_answer_not_each_chunk(world: World) -> None:
    def trickle(received: Received) -> Iterator[Reply]:
        for _ in range(400):
            yield reply("x")
            time.sleep(0.05)

    server, client = world.start(trickle, timeout_s=0.4)
    started = time.monotonic()
    with pytest.raises(RequestTimeout):
        list(client.stream(REQUEST))
    assert time.monotonic() - started < 10  # twenty without the limit
    assert len(server.stopped) == 1


def test_early_close_stops_the_request(world: World) -> None:
    server, client = start_hanging(world, "Par", "is")
    with closing(client.stream(REQUEST)) as stream:
        assert next(stream).text == "Par"
    assert server.stopped == [server.generated[0].request_id]


def test_an_exception_in_the_loop_stops_the_request(world: World) -> None:
    server, client = start_hanging(world, "Par", "is")
    with pytest.raises(ZeroDivisionError), closing(client.stream(REQUEST)) as stream:
        for _ in stream:
            raise ZeroDivisionError
    assert server.stopped == [server.generated[0].request_id]


def test_a_complete_stream_is_not_stopped(world: World) -> None:
    server, client = world.start(say("Par", "is"))
    with closing(client.stream(REQUEST)) as stream:
        for chunk in stream:
            if chunk.finish_reason:
                break
    assert server.stopped == []


def test_a_stream_that_was_never_read_sends_nothing(world: World) -> None:
    server, client = world.start(say("x"))
    client.stream(REQUEST).close()
    client.generate(REQUEST)  # a later request, to know that nothing else is on its way
    assert len(server.generated) == 1
    assert server.stopped == []


@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_stops_the_request(world: World, stream: bool) -> None:
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt(received: Received) -> Iterator[Reply]:
        if stream:
            yield reply("Par")
        time.sleep(0.1)
        signal.pthread_kill(main_thread, signal.SIGINT)
        deadline = time.monotonic() + 10
        while not server.stopped and time.monotonic() < deadline:
            time.sleep(0.01)

    server, client = world.start(interrupt)
    with pytest.raises(KeyboardInterrupt):
        if stream:
            list(client.stream(REQUEST))
        else:
            client.generate(REQUEST)
    assert server.stopped == [server.generated[0].request_id]


def test_a_stop_that_fails_is_logged_and_hides_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    server = world.serve(lambda received: iter([reply("Par"), {**reply(""), "finish_reason": "tired"}]))
    server.on_stop = Fail("unknown model: tiny-engine")
    client = world.client(server.url)
    with caplog.at_level(logging.WARNING), pytest.raises(ProtocolError, match="tired"):
        list(client.stream(REQUEST))
    assert server.generated[0].request_id in caplog.text
    assert "unknown model: tiny-engine" in caplog.text


@pytest.mark.slow
def test_sixteen_threads_share_one_client(world: World) -> None:
    everyone = threading.Barrier(16)

    def echo(received: Received) -> Iterator[Reply]:
        everyone.wait(60)  # broken unless all 16 are being answered at once
        for part in (received.inputs["text_input"], " and back"):
            yield reply(part)
        yield reply("", "stop")

    server, client = world.start(echo, timeout_s=60)

    def ask(number: int) -> str:
        request = replace(REQUEST, prompt=f"thread {number}")
        return "".join(chunk.text for chunk in client.stream(request))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(32)))
    assert answers == [f"thread {number} and back" for number in range(32)]
    assert len({received.request_id for received in server.generated}) == 32


def test_readiness_is_the_servers_word(world: World) -> None:
    _, client = world.start(say("x"))
    assert client.is_ready()
    assert client.is_ready(MODEL)
    assert not client.is_ready("another")


def test_a_closed_client_says_so(world: World) -> None:
    _, client = world.start(say("x"))
    with client as same:
        assert same.generate(REQUEST).text == "x"
    with pytest.raises(ClientError, match="closed"):
        client.generate(REQUEST)


def test_a_stream_left_open_ends_with_its_client(world: World) -> None:
    server, client = start_hanging(world, "Par")
    stream = client.stream(REQUEST)
    assert next(stream).text == "Par"
    client.close()
    stream.close()
    assert server.stopped == []


WRONG_URLS = {"grpc": ["http://localhost:8001", "localhost"], "http": ["localhost:8000", "http://a:b"]}


def test_malformed_arguments_are_named(world: World) -> None:
    right = "localhost:8001" if world.protocol == "grpc" else "http://localhost:8000"
    for url in WRONG_URLS[world.protocol]:
        with pytest.raises(ValueError, match=f"url must .*got '{url}'"):
            world.connect(MODEL, url)
    for timeout_s in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"timeout_s must .*got {timeout_s}"):
            world.connect(MODEL, right, timeout_s)
    with pytest.raises(ValueError, match="model must"):
        world.connect("", right)
