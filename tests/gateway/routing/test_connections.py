"""What runs on a server that hangs is broken off; new connections leave what runs on the old ones alone."""

from __future__ import annotations

import asyncio

import pytest

from deepseek_triton.clients import AsyncGrpcClient, GenerateRequest, ServedModel, ServerUnavailable
from deepseek_triton.gateway.backend.base import UpstreamCall
from deepseek_triton.gateway.backend.triton import TritonBackend
from tests.support.fake_triton import MODEL, Behaviour, fake_triton

REQUEST = GenerateRequest(prompt="a", max_tokens=20)


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", [Behaviour(behaviour="stall"), Behaviour(gap_s=60.0)])
def test_what_hangs_is_broken_off_at_once(behaviour: Behaviour) -> None:
    has_begun = behaviour.behaviour != "stall"

    async def run(url: str) -> None:
        async with AsyncGrpcClient(url, MODEL) as client:
            stream = client.stream(REQUEST)
            if has_begun:
                await anext(stream)
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.3)
            client.break_off(only_waiting=True)
            await asyncio.wait({waiting}, timeout=0.1 if has_begun else 30)
            assert waiting.done() != has_begun
            client.break_off()
            with pytest.raises(ServerUnavailable, match="doesn't answer any more"):
                await asyncio.wait({waiting}, timeout=30)
                waiting.result()
            assert client.num_running == 0

    with fake_triton(behaviour) as ports:
        asyncio.run(run(f"127.0.0.1:{ports.grpc}"))


@pytest.mark.slow
def test_a_stream_outlives_new_connections() -> None:
    async def run(url: str) -> None:
        backend = TritonBackend(url, (MODEL,), 60.0)
        backend._models = {MODEL: ServedModel(MODEL, "generate")}
        texts = []
        async for chunk in backend.stream(MODEL, REQUEST, UpstreamCall("1")):
            texts.append(chunk.text)
            if len(texts) == 2:
                backend.reconnect()
                assert await backend.generate(MODEL, REQUEST, UpstreamCall("2"))
        assert len(texts) == 12
        await backend.close()

    with fake_triton(Behaviour(gap_s=0.05, num_tokens=12)) as ports:
        asyncio.run(run(f"127.0.0.1:{ports.grpc}"))
