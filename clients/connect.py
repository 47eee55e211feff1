"""One client for each protocol, by name. The libraries behind them are imported when one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S
from deepseek_triton.clients.base import BaseClient

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
    return _CLIENTS[protocol](url or DEFAULT_URLS[protocol], model, timeout_s)


def _grpc(url: str, model: str, timeout_s: float) -> BaseClient:
    from deepseek_triton.clients.grpc import GrpcClient

    return GrpcClient(url, model, timeout_s)


def _http(url: str, model: str, timeout_s: float) -> BaseClient:
    from deepseek_triton.clients.http import HttpClient

    return HttpClient(url, model, timeout_s)


_CLIENTS: dict[ProtocolName, Callable[[str, str, float], BaseClient]] = {"grpc": _grpc, "http": _http}
