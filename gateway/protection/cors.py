"""Cors: pages of other origins may call the gateway only where the settings name them."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deepseek_triton.gateway.record import DEGRADED_HEADER, MODEL_HEADER
from deepseek_triton.gateway.settings import GatewaySettings

EXPOSED = (
    "retry-after",
    "x-request-id",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    MODEL_HEADER,
    DEGRADED_HEADER,
)


class Cors:
    """Middleware: answers preflights, which carry no key, and lets named origins read answers."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        if settings.cors_origins:
            self._app = CORSMiddleware(
                app,
                allow_origins=settings.cors_origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=EXPOSED,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on."""
        await self._app(scope, receive, send)
