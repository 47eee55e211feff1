"""What the app hands to its routes: the backend, the settings, and who collects answers."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from deepseek_triton.gateway.backend.base import Backend
from deepseek_triton.gateway.collection.collector import Collector
from deepseek_triton.gateway.settings import GatewaySettings


@dataclass(frozen=True)
class Context:
    """One app's parts; it lies in the app's state under `gateway`. collector: None collects nothing."""

    settings: GatewaySettings
    backend: Backend
    collector: Collector | None = None


def context_of(request: Request) -> Context:
    """The context of the app that handles the request."""
    context = request.app.state.gateway
    assert isinstance(context, Context)
    return context


def backend_of(request: Request) -> Backend:
    """The backend of the app that handles the request."""
    return context_of(request).backend
