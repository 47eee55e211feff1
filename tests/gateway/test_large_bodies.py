"""A body of tens of thousands of values holds up nobody else, and is checked as a small one is."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import httpx
import pytest

from deepseek_triton.gateway.apis.wire.large_bodies import LARGE_BYTES
from deepseek_triton.gateway.app import create_app
from deepseek_triton.gateway.settings import GatewaySettings
from tests.gateway.test_app import CHAT
from tests.support.gateway import FakeBackend

COUNT = 12_000
MESSAGE = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
LARGE: dict[str, tuple[str, dict[str, Any], int]] = {
    "messages": ("/v1/chat/completions", {"messages": [MESSAGE] * COUNT}, 200),
    "a wrong message": ("/v1/chat/completions", {"messages": [*[MESSAGE] * COUNT, {"role": "usr"}]}, 400),
    "unknown fields": ("/v1/chat/completions", {**CHAT, **{f"field_{index}": 1 for index in range(COUNT)}}, 400),
    "items": ("/v1/responses", {"input": [MESSAGE] * COUNT}, 200),
    "Anthropic's": ("/v1/messages", {"messages": [MESSAGE] * COUNT, "max_tokens": 5}, 200),
}


@pytest.fixture(scope="module")
def _frozen() -> None:
    """The garbage collector knows what is loaded, as in a gateway's own process.

    It stays so: otherwise it would look at all that is loaded again and again, in the tests that follow too.
    """
    gc.collect()
    gc.freeze()


@pytest.mark.slow
@pytest.mark.usefixtures("_frozen")
@pytest.mark.parametrize("name", LARGE)
def test_the_event_loop_goes_on(name: str) -> None:
    path, body, status = LARGE[name]
    app = create_app(GatewaySettings(), FakeBackend())

    async def longest_wait() -> tuple[int, float]:
        longest, is_done = 0.0, False

        async def watch() -> None:
            nonlocal longest
            while not is_done:
                started = time.process_time()  # a busy machine makes it wait too, but takes no time of its CPU
                await asyncio.sleep(0.002)
                longest = max(longest, time.process_time() - started)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            request = client.build_request("POST", path, json={"model": CHAT["model"], **body})
            await request.aread()
            watching = asyncio.create_task(watch())
            await asyncio.sleep(0)
            answer = await client.send(request)
            is_done = True
            await watching
        return answer.status_code, longest

    answered, longest = asyncio.run(longest_wait())
    assert answered == status
    assert longest < 0.3, f"{longest:.2f} s"


def test_what_is_wrong_is_told_as_in_a_small_body() -> None:
    app = create_app(GatewaySettings(), FakeBackend())
    wrong = {"model": CHAT["model"], "messages": [{"role": "usr", "content": "x"}]}

    async def errors() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
            small = await client.post("/v1/chat/completions", json=wrong)
            large = await client.post("/v1/chat/completions", json={**wrong, "user": "u" * LARGE_BYTES})
            return [small.json(), large.json()]

    small, large = asyncio.run(errors())
    assert small == large and small["error"]["param"] == "messages[0].role"
