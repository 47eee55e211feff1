"""What is loaded: a model's name and the server's three addresses."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.connect import connect
from deepseek_triton.loadtest.profile import ProtocolName


@dataclass(frozen=True)
class ServerUnderTest:
    """One served model."""

    model: str
    http_url: str
    grpc_url: str
    metrics_url: str

    @classmethod
    def at(
        cls, model: str, host: str, http_port: int = 8000, grpc_port: int = 8001, metrics_port: int = 8002
    ) -> ServerUnderTest:
        """The addresses of a tritonserver on `host`."""
        return cls(model, f"http://{host}:{http_port}", f"{host}:{grpc_port}", f"http://{host}:{metrics_port}/metrics")

    def client(self, protocol: ProtocolName, timeout_s: float) -> BaseClient:
        """A client for one way in."""
        if protocol.startswith("grpc"):
            return connect("grpc", self.model, self.grpc_url, timeout_s)
        return connect("http", self.model, self.http_url, timeout_s)
