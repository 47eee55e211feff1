"""The server under test: a model's name, the server's three addresses, and the gateway's before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.connect import connect
from deepseek_triton.loadtest.profile import ProtocolName

if TYPE_CHECKING:
    from deepseek_triton.loadtest.openai_client import OpenAiClient


@dataclass(frozen=True)
class ServerUnderTest:
    """One served model."""

    model: str
    http_url: str
    grpc_url: str
    metrics_url: str
    gateway_url: str = ""

    @classmethod
    def at(
        cls,
        model: str,
        host: str,
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        gateway_url: str = "",
    ) -> ServerUnderTest:
        """The addresses of a tritonserver on `host`."""
        metrics_url = f"http://{host}:{metrics_port}/metrics"
        return cls(model, f"http://{host}:{http_port}", f"{host}:{grpc_port}", metrics_url, gateway_url)

    def client(self, protocol: ProtocolName, timeout_s: float) -> BaseClient | OpenAiClient:
        """A client for one protocol."""
        if protocol.startswith("openai"):
            from deepseek_triton.loadtest.openai_client import OpenAiClient

            return OpenAiClient(self.gateway_url, self.model, timeout_s)
        if protocol.startswith("grpc"):
            return connect("grpc", self.model, self.grpc_url, timeout_s)
        return connect("http", self.model, self.http_url, timeout_s)
