"""A gateway for one run: the program `deepseek-gateway serve` in front of a tritonserver that this run has started."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import httpx

from deepseek_triton.free_ports import free_ports

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.1
SETTINGS = "DEEPSEEK_GATEWAY_"  # environment variables of another gateway's settings begin so


class GatewayError(Exception):
    """The gateway doesn't start; the message is one line."""


@contextlib.contextmanager
def started_gateway(grpc_url: str, model: str) -> Iterator[str]:
    """Start one without keys on a free port of this machine; gives its URL, and stops it at the end.

    Raises:
        GatewayError: it ends, or isn't ready in time; the message has its last line.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "deepseek_triton.gateway", "serve", "--port", str(port)]
    command += ["--backend-url", grpc_url, "--model", model, "--log-level", "error"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = (log.read().decode(errors="replace").strip() or "it said nothing").splitlines()[-1]
                    raise GatewayError(f"the gateway doesn't start: {last.removeprefix('error: ')}")
                time.sleep(POLL_S)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError), httpx.Client(trust_env=False, timeout=2) as client:
        return client.get(f"{url}/health/ready").status_code == httpx.codes.OK
    return False
