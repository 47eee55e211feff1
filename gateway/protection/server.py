"""How uvicorn serves the app within its bounds."""

from __future__ import annotations

import ipaddress
from typing import Any

from deepseek_triton.gateway.protection.connection import Connections
from deepseek_triton.gateway.settings import GatewaySettings

# Seconds that uvicorn waits for connections after the drain, before it cancels what still writes to them.
GRACE_S = 3


def uvicorn_options(settings: GatewaySettings) -> dict[str, Any]:
    """uvicorn's options, but for the app, where it listens and its workers."""
    return {
        "http": Connections(settings),
        "ws": "none",
        "lifespan": "on",
        "timeout_keep_alive": settings.idle_timeout_s,
        "timeout_graceful_shutdown": GRACE_S,
        "proxy_headers": False,  # a client could name an address that isn't its own
        "access_log": False,
        "server_header": False,
        "log_level": "warning",
    }


def check_exposure(settings: GatewaySettings) -> None:
    """Raise `ValueError` for a gateway that would let strangers in without keys."""
    if not (settings.keys or settings.anonymous or _is_loopback(settings.host)):
        raise ValueError(
            f"--host {settings.host} lets strangers in: say with --keys where API keys are kept, or --anonymous"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
