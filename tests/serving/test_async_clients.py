"""asyncio clients against the real server: answers equal those of sync clients, and abandoned requests end."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from deepseek_triton.clients import AsyncClient, GenerateRequest, RequestRejected, RequestTimeout
from deepseek_triton.clients.connect import PROTOCOLS, ProtocolName, connect, connect_async
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import MAX_SEQ_LEN, NAME
from tests.support.serving import PUBLISH_S, TIMEOUT_S, metrics, wait_until
from tests.support.tasks import check_no_tasks, told

pytestmark = pytest.mark.server

CAPITAL = GenerateRequest(prompt="The capital of France is", max_tokens=20)
LONG = GenerateRequest(prompt="1 2 3 4 5 6 7 8")  # counting goes on to the context's end
# cancel_after_s, plus an allowance for a step, the machine's load and the metrics' interval.
LIMIT_S = 1.0 + PUBLISH_S + 0.75
NUM_STREAMS = 32


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> ProtocolName:
    name: ProtocolName = request.param
    return name


def url_of(server: TritonServer, protocol: ProtocolName) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


async def streamed(client: AsyncClient, request: GenerateRequest, *, request_id: str | None = None) -> str:
    return "".join([chunk.text async for chunk in client.stream(request, request_id=request_id)])


async def read_until_cancelled(client: AsyncClient, begun: asyncio.Event) -> None:
    async with aclosing(client.stream(LONG)) as chunks:
        async for _ in chunks:
            begun.set()


def test_answers_are_those_of_the_synchronous_client(tiny_server: TritonServer, protocol: ProtocolName) -> None:
    request = replace(CAPITAL, num_top_log_probs=2)
    several = replace(CAPITAL, temperature=1.0, seed=3, num_return_sequences=3)
    url = url_of(tiny_server, protocol)
    with connect(protocol, NAME, url, TIMEOUT_S) as client:
        expected = client.generate(request).text
        expected_several = [answer.text for answer in client.generate_all(several)]

    async def main() -> None:
        async with connect_async(protocol, NAME, url, TIMEOUT_S) as client:
            assert await client.is_ready() and not await client.is_ready("another")
            assert await client.max_seq_len() == MAX_SEQ_LEN
            answer = await client.generate(request)
            assert answer.text == expected and len(answer.top_log_probs) == answer.num_output_tokens
            assert await streamed(client, request) == expected
            assert [answer.text for answer in await client.generate_all(several)] == expected_several

    asyncio.run(main())


def test_many_streams_of_one_client(tiny_server: TritonServer, protocol: ProtocolName) -> None:
    """More than there are slots: some wait in the queue."""

    async def main() -> list[str]:
        async with connect_async(protocol, NAME, url_of(tiny_server, protocol), TIMEOUT_S) as client:
            requests = [replace(CAPITAL, prompt=f"Tell me of {number % 4}") for number in range(NUM_STREAMS)]
            texts = await asyncio.gather(*(streamed(client, request) for request in requests))
            await check_no_tasks()
            return texts

    texts = asyncio.run(main())
    assert len(set(texts)) == 4
    assert texts == texts[:4] * (NUM_STREAMS // 4)


@pytest.mark.timed
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_cancelled_task_frees_its_slot(server: TritonServer, protocol: ProtocolName, is_streamed: bool) -> None:
    wait_until(server, 60, slots_used=0)
    cancelled = metrics(server)["requests_cancelled_total"]

    async def main() -> None:
        async with connect_async(protocol, NAME, url_of(server, protocol), TIMEOUT_S) as client:
            begun = asyncio.Event()
            work = read_until_cancelled(client, begun) if is_streamed else client.generate(LONG)
            task: asyncio.Task[object] = asyncio.create_task(work)
            if is_streamed:
                await told(begun, task)
            await asyncio.to_thread(wait_until, server, 60, slots_used=1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            took = await asyncio.to_thread(
                wait_until, server, LIMIT_S, requests_cancelled_total=cancelled + 1, slots_used=0
            )
            print(f"the slot was free after {took:.2f} s")
            # The connection is still good.
            assert (await client.generate(CAPITAL)).finish_reason == "length"

    asyncio.run(main())


@pytest.mark.timed
def test_a_loop_that_is_left_frees_its_slot(server: TritonServer, protocol: ProtocolName) -> None:
    async def main() -> None:
        async with connect_async(protocol, NAME, url_of(server, protocol), TIMEOUT_S) as client:
            async with aclosing(client.stream(LONG)) as chunks:
                async for _ in chunks:
                    break
            await asyncio.to_thread(wait_until, server, LIMIT_S, slots_used=0)

    asyncio.run(main())


def test_a_request_is_stopped_by_its_id(server: TritonServer, protocol: ProtocolName) -> None:
    async def main() -> None:
        async with connect_async(protocol, NAME, url_of(server, protocol), TIMEOUT_S) as client:
            await asyncio.to_thread(wait_until, server, 60, slots_used=0)  # of others
            running = asyncio.create_task(client.generate(LONG, request_id=f"mine-{protocol}"))
            await asyncio.to_thread(wait_until, server, 60, slots_used=1)
            await client.stop(f"mine-{protocol}")
            assert (await running).finish_reason == "cancelled"

    asyncio.run(main())


def test_errors_are_the_clients_own(server: TritonServer, protocol: ProtocolName) -> None:
    async def main() -> None:
        url = url_of(server, protocol)
        async with connect_async(protocol, NAME, url, TIMEOUT_S) as client:
            with pytest.raises(RequestRejected, match="priority is 7, must be 1"):
                await client.generate(replace(CAPITAL, priority=7))
            with pytest.raises(RequestRejected, match="timed out"):
                await client.generate(replace(LONG, timeout_ms=200))
        async with connect_async(protocol, NAME, url, 0.5) as client:
            with pytest.raises(RequestTimeout, match=r"within 0\.5 s"):
                await client.generate(LONG)
        await asyncio.to_thread(wait_until, server, 60, slots_used=0)

    asyncio.run(main())
