"""Ports that a server may take: nothing listens on them, and Linux gives them to no outgoing connection."""

from __future__ import annotations

import contextlib
import secrets
import socket

PORTS = range(15_000, 32_768)  # an outgoing connection could take one of those above before the server does
TRIES = 20


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """So many different ports of `host`. They are free now; another process may still take one.

    Raises:
        OSError: `host` isn't an address of this machine.
    """
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            bind_free_port(listener, host)
        return [int(listener.getsockname()[1]) for listener in listeners]


def bind_free_port(listener: socket.socket, host: str) -> None:
    """Bind to such a port, or to any free one where twenty tries found none.

    Raises:
        OSError: `host` isn't an address of this machine.
    """
    for _ in range(TRIES):
        with contextlib.suppress(OSError):
            return listener.bind((host, secrets.choice(PORTS)))
    listener.bind((host, 0))
