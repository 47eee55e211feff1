"""Clients by the name of their protocol. The libraries behind them are imported when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S
from deepseek_triton.clients.base import BaseClient

if TYPE_CHECKING:
    from deepseek_triton.clients.async_base import AsyncBaseClient

ProtocolName = Literal["grpc", "http"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
# tritonserver's own ports
DEFAULT_URLS: dict[ProtocolName, str] = {"grpc": "localhost:8001", "http": "http://localhost:8000"}


def connect(
    protocol: ProtocolName, model: str, url: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> BaseClient:
    """Give a client for the served `model`; nothing is sent yet. `url` None: this machine.

    Raises `ValueError` for a malformed address, `ModuleNotFoundError` without the `client` extra.
    """
    url = url or DEFAULT_URLS[protocol]
    if protocol == "grpc":
        from deepseek_triton.clients.grpc import GrpcClient

        return GrpcClient(url, model, timeout_s)
    from deepseek_triton.clients.http import HttpClient

    return HttpClient(url, model, timeout_s)


def connect_async(
    protocol: ProtocolName, model: str, url: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> AsyncBaseClient:
    """Give an asyncio client; the arguments and errors are those of `connect`."""
    url = url or DEFAULT_URLS[protocol]
    if protocol == "grpc":
        from deepseek_triton.clients.async_grpc import AsyncGrpcClient

        return AsyncGrpcClient(url, model, timeout_s)
    from deepseek_triton.clients.async_http import AsyncHttpClient

    return AsyncHttpClient(url, model, timeout_s)
