"""Behaviour of asyncio clients alone: cancelled tasks, and loops that are left early."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_triton.clients.api import AsyncClient, GenerateRequest
from deepseek_triton.clients.async_base import AsyncBaseClient
from deepseek_triton.clients.connect import PROTOCOLS, ProtocolName, connect_async
from deepseek_triton.clients.errors import ClientError, ProtocolError
from tests.clients.test_fakes import (
    MODEL,
    Fail,
    FakeGrpcServer,
    FakeHttpServer,
    FakeServer,
    Received,
    Reply,
    reply,
    say,
    wait_until,
)
from tests.support.tasks import check_no_tasks, told

REQUEST = GenerateRequest(prompt="Hello")


class AsyncWorld:
    """One protocol: a fake server, and clients of it."""

    def __init__(self, protocol: ProtocolName) -> None:
        self.protocol = protocol
        kind: type[FakeServer] = FakeGrpcServer if protocol == "grpc" else FakeHttpServer
        self.server = kind(say("x"))

    def client(self, timeout_s: float = 10.0) -> AsyncBaseClient:
        return connect_async(self.protocol, MODEL, self.server.url, timeout_s)

    def run(self, use: Callable[[AsyncBaseClient], Awaitable[None]], timeout_s: float = 10.0) -> None:
        """Give `use` a client; after it, neither tasks nor sockets may be left."""

        async def main() -> None:
            async with self.client(timeout_s) as client:
                await use(client)
            await check_no_tasks()

        asyncio.run(main())
        wait_until(lambda: not connections(int(self.server.url.rpartition(":")[2])), 2.0)

    def hang_after(self, *texts: str) -> None:
        """Answer with `texts`, without an end, until a request is stopped; then say so."""

        def script(received: Received) -> Iterator[Reply]:
            for text in texts:
                yield reply(text)
            self.server.wait_for_stop(10)
            yield reply("", "cancelled")

        self.server.script = script


def connections(port: int) -> list[str]:
    """The open sockets of this machine that lead to `port`, as /proc/net/tcp lists them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    is_open = ("01", "08")  # ESTABLISHED, CLOSE_WAIT
    return [row[1] for row in rows if int(row[2].split(":")[1], 16) == port and row[3] in is_open]


@pytest.fixture(params=PROTOCOLS)
def world(request: pytest.FixtureRequest) -> Iterator[AsyncWorld]:
    world = AsyncWorld(request.param)
    with world.server:
        yield world


def only_id(world: AsyncWorld) -> str:
    (received,) = world.server.generated
    return received.request_id


async def first_chunk(client: AsyncClient, seen: asyncio.Event) -> None:
    async with aclosing(client.stream(REQUEST)) as chunks:
        async for _ in chunks:
            seen.set()


def test_a_cancelled_stream_is_stopped_on_the_server(world: AsyncWorld) -> None:
    world.hang_after("Par")

    async def use(client: AsyncBaseClient) -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(first_chunk(client, seen))
        await told(seen, task)
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - started < 9  # ten unless it is stopped
        assert world.server.stopped == [only_id(world)]

    world.run(use)


def test_the_last_response_is_waited_for_before_the_call_ends(world: AsyncWorld) -> None:
    """Triton never forgets an ensemble request whose caller hangs up before the engine has ended it."""
    ended: list[str] = []

    def script(received: Received) -> Iterator[Reply]:
        yield reply("Par")
        world.server.wait_for_stop(10)
        time.sleep(0.2)
        yield reply("", "cancelled")
        ended.append(received.request_id)

    async def use(client: AsyncBaseClient) -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(first_chunk(client, seen))
        await told(seen, task)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [only_id(world)]

    world.server.script = script
    world.run(use)


def test_a_second_cancellation_does_not_keep_the_request_running(world: AsyncWorld) -> None:
    world.hang_after("Par")

    async def use(client: AsyncBaseClient) -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(first_chunk(client, seen))
        await told(seen, task)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task

    world.run(use)
    assert world.server.stopped == [only_id(world)]


@pytest.mark.slow
def test_a_cancelled_generate_is_stopped_on_the_server(world: AsyncWorld) -> None:
    world.hang_after()

    async def use(client: AsyncBaseClient) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.generate(REQUEST), 0.6)
        assert world.server.stopped == [only_id(world)]

    world.run(use)


def test_an_abandoned_loop_stops_the_request(world: AsyncWorld) -> None:
    """Without aclosing, asyncio closes the iterator when it is collected."""
    world.hang_after("Par", "is")

    async def use(client: AsyncBaseClient) -> None:
        async for chunk in client.stream(REQUEST):
            assert chunk.text == "Par"
            break
        deadline = time.monotonic() + 30
        while not world.server.stopped and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        assert world.server.stopped == [only_id(world)]

    world.run(use)


def test_thirty_two_streams_share_one_client(world: AsyncWorld) -> None:
    def back(received: Received) -> Iterator[Reply]:
        for part in (received.inputs["text_input"], " and back"):
            yield reply(part)
        deadline = time.monotonic() + 30
        while len(world.server.generated) < 32 and time.monotonic() < deadline:
            time.sleep(0.01)  # all are answered at once
        yield reply("", "stop")

    async def ask(client: AsyncClient, number: int) -> str:
        return "".join([chunk.text async for chunk in client.stream(replace(REQUEST, prompt=f"task {number}"))])

    async def use(client: AsyncBaseClient) -> None:
        answers = await asyncio.gather(*(ask(client, number) for number in range(32)))
        assert answers == [f"task {number} and back" for number in range(32)]
        assert world.server.stopped == []

    world.server.script = back
    world.run(use)


def test_other_tasks_run_while_one_waits(world: AsyncWorld) -> None:
    world.hang_after("Par")

    async def use(client: AsyncBaseClient) -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(first_chunk(client, seen))
        await told(seen, task)
        assert await client.is_ready()
        await client.stop(only_id(world))
        await task

    world.run(use)


def test_closing_the_client_ends_a_stream_that_waits(world: AsyncWorld) -> None:
    world.hang_after("Par")

    async def use(client: AsyncBaseClient) -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(first_chunk(client, seen))
        await told(seen, task)
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(ClientError):
            await asyncio.wait_for(task, 5)

    world.run(use)
    assert world.server.stopped == []


def test_a_stop_that_fails_hides_no_cancellation(world: AsyncWorld, caplog: pytest.LogCaptureFixture) -> None:
    world.hang_after("Par")
    world.server.on_stop = Fail("unknown model: tiny-engine")

    async def use(client: AsyncBaseClient) -> None:
        seen = asyncio.Event()
        task = asyncio.create_task(first_chunk(client, seen))
        await told(seen, task)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    world.run(use)
    assert "unknown model: tiny-engine" in caplog.text


def test_the_consumer_sets_the_pace(world: AsyncWorld) -> None:
    """At most one response is read ahead, so that the server sees a client that lags."""
    world.server.script = say(*"abcdef")

    async def use(client: AsyncBaseClient) -> None:
        chunks = []
        async for chunk in client.stream(REQUEST):
            chunks.append(chunk.text)
            await asyncio.sleep(0.02)
        assert chunks == list("abcdef")

    world.run(use)


def test_an_error_is_raised_after_the_chunks_before_it(world: AsyncWorld) -> None:
    world.server.script = lambda received: iter([reply("Par"), reply("is", "tired")])

    async def use(client: AsyncBaseClient) -> None:
        chunks = client.stream(REQUEST)
        assert (await anext(chunks)).text == "Par"
        with pytest.raises(ProtocolError, match="tired"):
            await anext(chunks)

    world.run(use)
    assert world.server.stopped == [only_id(world)]


def test_a_client_can_be_made_before_its_loop(world: AsyncWorld) -> None:
    client = world.client()

    async def main() -> str:
        async with client:
            return (await client.generate(REQUEST)).text

    assert asyncio.run(main()) == "x"


def test_nothing_listens(world: AsyncWorld) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"127.0.0.1:{port}" if world.protocol == "grpc" else f"http://127.0.0.1:{port}"

    async def main() -> bool:
        async with connect_async(world.protocol, MODEL, url) as client:
            return await client.is_ready()

    assert asyncio.run(main()) is False
