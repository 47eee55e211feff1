"""A server that moves to another address under the same name; prints the seconds after which a client has found it.

    python -m tests.support.moved_server HOSTS

runs where HOSTS is mounted over /etc/hosts, in a mount namespace of its own.
"""

from __future__ import annotations

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek_triton.clients import AsyncCatalogue

NAME = "moved.test"
ADDRESSES = ("127.0.0.2", "127.0.0.3")
LIMIT_S = 15.0


class _Live(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)


def _serve(address: str, port: int) -> tuple[Any, int]:
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Live(), server)
    bound = server.add_insecure_port(f"{address}:{port}")
    server.start()
    return server, bound


async def find(hosts: Path) -> float:
    hosts.write_text(f"{ADDRESSES[0]} {NAME}\n", encoding="utf-8")
    old, port = _serve(ADDRESSES[0], 0)
    async with AsyncCatalogue(f"{NAME}:{port}") as catalogue:
        assert await catalogue.is_live()
        old.stop(None).wait()
        new, _ = _serve(ADDRESSES[1], port)
        hosts.write_text(f"{ADDRESSES[1]} {NAME}\n", encoding="utf-8")
        began = time.monotonic()
        while not await catalogue.is_live() and time.monotonic() - began < LIMIT_S:
            await asyncio.sleep(0.1)
        seconds = time.monotonic() - began
        new.stop(None).wait()
    return seconds


if __name__ == "__main__":
    print(asyncio.run(find(Path(sys.argv[1]))))
