"""Clients of a served model, and what they take and give.

    from deepseek_triton.clients import GenerateRequest, GrpcClient

    with GrpcClient("localhost:8001", "smollm2") as client:
        print(client.generate(GenerateRequest(prompt="The capital of France is")).text)

A name's module is imported when the name is first used: tritonclient is needed for the gRPC clients alone, httpx for
the HTTP clients.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_triton.clients.api import AsyncClient, Client
    from deepseek_triton.clients.async_catalogue import AsyncCatalogue, ServedModel
    from deepseek_triton.clients.async_grpc import AsyncGrpcClient
    from deepseek_triton.clients.async_http import AsyncHttpClient
    from deepseek_triton.clients.errors import (
        ClientError,
        ProtocolError,
        RequestRejected,
        RequestTimeout,
        ServerOverloaded,
        ServerUnavailable,
    )
    from deepseek_triton.clients.generation import Generation
    from deepseek_triton.clients.grpc import GrpcClient
    from deepseek_triton.clients.http import HttpClient
    from deepseek_triton.clients.messages import Message
    from deepseek_triton.clients.request import GenerateRequest
    from deepseek_triton.clients.response import Chunk, Times, Token, ToolCall, TopLogProb
    from deepseek_triton.clients.score import Embedding, Score, ScoreRequest

__all__ = [
    "AsyncCatalogue",
    "AsyncClient",
    "AsyncGrpcClient",
    "AsyncHttpClient",
    "Chunk",
    "Client",
    "ClientError",
    "Embedding",
    "GenerateRequest",
    "Generation",
    "GrpcClient",
    "HttpClient",
    "Message",
    "ProtocolError",
    "RequestRejected",
    "RequestTimeout",
    "Score",
    "ScoreRequest",
    "ServedModel",
    "ServerOverloaded",
    "ServerUnavailable",
    "Times",
    "Token",
    "ToolCall",
    "TopLogProb",
]

_NAMES = {
    "api": ("AsyncClient", "Client"),
    "async_catalogue": ("AsyncCatalogue", "ServedModel"),
    "async_grpc": ("AsyncGrpcClient",),
    "async_http": ("AsyncHttpClient",),
    "errors": (
        "ClientError",
        "ProtocolError",
        "RequestRejected",
        "RequestTimeout",
        "ServerOverloaded",
        "ServerUnavailable",
    ),
    "generation": ("Generation",),
    "grpc": ("GrpcClient",),
    "http": ("HttpClient",),
    "messages": ("Message",),
    "request": ("GenerateRequest",),
    "response": ("Chunk", "Times", "Token", "ToolCall", "TopLogProb"),
    "score": ("Embedding", "Score", "ScoreRequest"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
