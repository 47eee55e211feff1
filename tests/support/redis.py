"""A Redis of a test's own, on a free port; tests that need one are skipped where `redis-server` isn't installed."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

import pytest

from deepseek_triton.free_ports import free_ports

COMMAND = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(COMMAND is None, reason="redis-server isn't installed (Debian: redis-server)")


class RedisProcess:
    """A Redis that can be killed and started again, with what its append-only file holds."""

    def __init__(self, directory: str, *, is_durable: bool) -> None:
        (self._port,) = free_ports(1)
        self._directory = directory
        self._more = ("--appendonly", "yes", "--appendfsync", "always") if is_durable else ()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert COMMAND is not None
        options = ("--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", self._directory)
        self._process = subprocess.Popen([COMMAND, *options, *self._more], stdout=subprocess.DEVNULL)
        _wait(self._port, self._process)

    def kill(self) -> None:
        """Kill it with -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def redis_process() -> Iterator[RedisProcess]:
    """One with an append-only file."""
    with tempfile.TemporaryDirectory() as directory:
        redis = RedisProcess(directory, is_durable=True)
        try:
            redis.start()
            yield redis
        finally:
            redis.kill()


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """Its URL."""
    with tempfile.TemporaryDirectory() as directory:
        redis = RedisProcess(directory, is_durable=False)
        try:
            redis.start()
            yield redis.url
        finally:
            redis.kill()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(16).startswith(b"+PONG"):  # it has read its file
                    return
        except OSError:
            pass
        assert process.poll() is None and time.monotonic() < deadline, "Redis didn't start"
        time.sleep(0.02)
