"""A gateway in a process of its own, as its command starts it, or with a backend that is given."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_triton.free_ports import free_ports
from deepseek_triton.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from fastapi import FastAPI

START_S = 60.0
END_S = 40.0
APP = "BENCHMARK_GATEWAY"  # the environment variable that tells workers which app to make


@dataclass(frozen=True)
class RunningGateway:
    """url: where it listens."""

    url: str
    process: subprocess.Popen[bytes]

    def lives(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def rss_mib(self) -> float:
        """Memory that it uses now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def gateway_process(*options: str) -> Iterator[RunningGateway]:
    """Start `deepseek-gateway serve` with `options` on a free port; it is stopped at the end."""
    with _process("-m", "deepseek_triton.gateway", "serve", *options, "--port") as gateway:
        yield gateway


@contextlib.contextmanager
def app_process(backend: str, **settings: object) -> Iterator[RunningGateway]:
    """Start a gateway with the backend that a class makes; `backend` is MODULE:CLASS. Its `workers` have one each."""
    with _process("-m", "benchmarks.gateway.process", backend, json.dumps(settings)) as gateway:
        yield gateway


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[RunningGateway]:
    """Python with `arguments`, and a free port behind them."""
    (port,) = free_ports(1)
    process = subprocess.Popen([sys.executable, *arguments, str(port)])
    try:
        deadline = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the gateway didn't start")
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.05)
        yield RunningGateway(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()  # its workers end with it
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_app() -> FastAPI:
    """The app of one worker, as $BENCHMARK_GATEWAY tells: MODULE:CLASS of the backend, and the settings."""
    from deepseek_triton.gateway.app import create_app

    backend, settings = json.loads(os.environ[APP])
    module, name = backend.split(":")
    return create_app(GatewaySettings(**settings), getattr(importlib.import_module(module), name)())


def main(backend: str, settings_text: str, port: str) -> None:
    """Serve with the backend on the port."""
    import uvicorn

    from deepseek_triton.gateway.protection.server import uvicorn_options

    settings = json.loads(settings_text)
    os.environ[APP] = json.dumps([backend, settings])
    options = GatewaySettings(**settings)
    app = "benchmarks.gateway.process:make_app"
    uvicorn.run(app, factory=True, port=int(port), workers=options.workers, **uvicorn_options(options))


if __name__ == "__main__":
    main(*sys.argv[1:])
