"""Requests as bytes, for what no well-behaved client sends."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class RawAnswer:
    """status: None: the connection was closed without an answer. seconds: until it was closed, or complete."""

    status: int | None
    text: bytes
    seconds: float


def connect(url: str, timeout_s: float = 10.0) -> socket.socket:
    """A connection to the server at `url`."""
    place = urlsplit(url)
    return socket.create_connection((place.hostname, place.port), timeout_s)


def post_head(length: int | None, path: str = "/v1/chat/completions", **headers: str) -> bytes:
    """A request's line and headers; length None: a chunked body follows."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    lines += ["Transfer-Encoding: chunked"] if length is None else [f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def send_raw(url: str, data: bytes, timeout_s: float = 10.0) -> RawAnswer:
    """Send bytes; read until the answer to the first request is whole or the connection is closed."""
    with connect(url, timeout_s) as connection:
        start = time.monotonic()
        with contextlib.suppress(OSError):  # the answer may have come before all was sent
            connection.sendall(data)
        return read_answer(connection, start)


def read_answer(connection: socket.socket, start: float) -> RawAnswer:
    """Read one answer, whose end Content-Length or the connection's end tells."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while not _is_whole(received) and (part := connection.recv(65536)):
            received += part
    status = int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/1.1 ") else None
    return RawAnswer(status, received, time.monotonic() - start)


def _is_whole(received: bytes) -> bool:
    head, mark, body = received.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if mark and line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    return body.endswith(b"0\r\n\r\n")
