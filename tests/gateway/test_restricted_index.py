"""A server that keeps its index for its administrator, as `deepseek-triton serve` does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek_triton.clients import AsyncCatalogue, RequestRejected
from tests.support.gateway import gateway

# As Triton 2.51 words it.
TEXT = "This protocol is restricted, expecting header 'triton-grpc-protocol-x-triton-admin'"
KEY = "the administrator's"


class Restricted(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        if ("triton-grpc-protocol-x-triton-admin", KEY) not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAVAILABLE, TEXT)
        return service_pb2.RepositoryIndexResponse(models=[service_pb2.RepositoryIndexResponse.ModelIndex(name="r1")])


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Restricted(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


def test_the_catalogue_tells_it_from_a_server_that_is_not_there(server: str) -> None:
    async def ask() -> None:
        catalogue = AsyncCatalogue(server)
        with pytest.raises(RequestRejected, match="restricted"):
            await catalogue.names()
        await catalogue.close()

    asyncio.run(ask())


def test_who_has_the_key_reads_it(server: str) -> None:
    async def ask() -> tuple[str, ...]:
        async with AsyncCatalogue(server, KEY) as catalogue:
            return await catalogue.names()

    assert asyncio.run(ask()) == ("r1",)


def test_operator_and_client_read_what_to_do(server: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), gateway(backend_urls=(server,)) as url:
        assert "name them with --model" in caplog.text
        answer = httpx.post(
            f"{url}/v1/chat/completions", json={"model": "x", "messages": [{"role": "user", "content": "a"}]}
        )
    assert answer.status_code == 502 and "name them with --model" in answer.json()["error"]["message"]
