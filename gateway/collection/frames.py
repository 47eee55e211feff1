"""Messages over a socket: four bytes of length, then the bytes."""

from __future__ import annotations

import socket
import struct
import time

HEAD = struct.Struct("!I")


def send(connection: socket.socket, message: bytes) -> None:
    """Send one message. Raises `OSError`, of which `TimeoutError` is one."""
    connection.sendall(HEAD.pack(len(message)) + message)


def receive(connection: socket.socket, within_s: float | None = None) -> bytes | None:
    """One message; None: the other side has closed. Raises `TimeoutError` after `within_s` seconds."""
    deadline = None if within_s is None else time.monotonic() + within_s
    head = _exactly(connection, HEAD.size, deadline)
    return None if head is None else _exactly(connection, HEAD.unpack(head)[0], deadline)


def _exactly(connection: socket.socket, size: int, deadline: float | None) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)
