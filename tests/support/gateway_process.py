"""A gateway with a `FakeBackend` in a process of its own, which signals reach and whose memory can be measured."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_triton.quick_imports import quick_imports

with quick_imports():
    import uvicorn

    from deepseek_triton.clients import Chunk
    from deepseek_triton.gateway.app import create_app
    from deepseek_triton.gateway.protection.server import uvicorn_options
    from deepseek_triton.gateway.settings import GatewaySettings
    from tests.support.gateway import FakeBackend

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class GatewayProcess:
    """url: where it listens. log: what it wrote."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def rss_mib(self) -> float:
        """Memory that it uses now."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def gateway_process(
    directory: Path, num_chunks: int = 2, pause_s: float = 0.0, text: str = "a", **settings: object
) -> Iterator[GatewayProcess]:
    """Start one; its answers have `num_chunks` chunks of `text`, with `pause_s` before each."""
    with socket.socket() as listener, (directory / "gateway.log").open("wb") as log:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        given = {"num_chunks": num_chunks, "pause_s": pause_s, "text": text, "settings": settings}
        command = [sys.executable, "-m", "tests.support.gateway_process", str(listener.fileno()), json.dumps(given)]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=(listener.fileno(),), stdout=log, stderr=log)
        try:
            port = listener.getsockname()[1]
            listener.close()
            _wait(port, process)
            yield GatewayProcess(f"http://127.0.0.1:{port}", process, directory / "gateway.log")
        finally:
            process.kill()
            process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until it answers."""
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "the gateway didn't start"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if connection.recv(64):
                return
        time.sleep(0.05)


def main() -> None:
    """Serve on the socket whose descriptor is given, with the answers and the settings that are given."""
    given = json.loads(sys.argv[2])
    settings = GatewaySettings(**given["settings"])
    chunks = [Chunk(given["text"], "", 5, index + 1) for index in range(given["num_chunks"] - 1)]
    backend = FakeBackend([*chunks, Chunk("", "stop", 5, given["num_chunks"])], pause_s=given["pause_s"])
    backend.is_remembering = False
    config = uvicorn.Config(create_app(settings, backend), **uvicorn_options(settings))
    uvicorn.Server(config).run([socket.socket(fileno=int(sys.argv[1]))])


if __name__ == "__main__":
    main()
