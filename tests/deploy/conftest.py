"""A real Prometheus that scrapes a real tritonserver under load, and a GPU's exposition from a file.

No GPU is here: gpu_exposition.txt has the names and labels of Triton's documentation.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.free_ports import free_ports
from deepseek_triton.gateway.backend.routing.shares import Arm, Route, write_routes
from deepseek_triton.gateway.protection.keys.api_key import ApiKey, after_days
from deepseek_triton.gateway.protection.keys.store import open_store
from deepseek_triton.loadtest.profile import DIRECTORY as PROFILES
from deploy import files
from deploy.metrics import GATEWAY_JOB, JOB
from deploy.prometheus_api import Prometheus
from tests.conftest import NAME

ROUTE = "routed"  # a name that the model answers by a route
PAUSE_S = 0.3  # of the gateway's client between its rounds: enough for each panel, and the load test isn't slowed
GPU = (Path(__file__).parent / "gpu_exposition.txt").read_text(encoding="utf-8")


class _Gpu(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = GPU.replace("{ENERGY}", str(time.monotonic() * 500)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="package")
def gpu_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gpu) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def run_smoke_profile(server: TritonServer, folder: Path) -> None:
    """The load test's smoke profile, its twenty requests within five seconds, in a process of its own.

    The machine may be too busy for its figures to count.
    """
    text = (PROFILES / "smoke.toml").read_text(encoding="utf-8").replace("warmup_s = 3", "warmup_s = 0.5")
    text = (
        text.replace("seconds = 20", "seconds = 5")
        .replace("start = 1.0", "start = 4.0")
        .replace("end = 1.0", "end = 4.0")
    )
    (folder / "smoke.toml").write_text(text, encoding="utf-8")
    urls = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url}
    ports = [word for name, url in urls.items() for word in (f"--{name}-port", re.search(r":(\d+)", url[6:])[1])]  # type: ignore[index]
    words = [
        str(folder / "smoke.toml"),
        "--model",
        NAME,
        "--host",
        "127.0.0.1",
        "--shared-machine",
        "--output",
        str(folder / "load"),
    ]
    command = [sys.executable, "-m", "deepseek_triton.loadtest.run", *words, *ports]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert re.search(r"smoke: (\d+) of \1 requests complete", done.stdout), done.stdout + done.stderr


@dataclass(frozen=True)
class Gateway:
    """A gateway that runs, and a key of it."""

    url: str
    key: str


@pytest.fixture(scope="package")
def watched_gateway(tiny_server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A real gateway in front of the server; its key expires in thirty days."""
    (port,) = free_ports(1)
    folder = tmp_path_factory.mktemp("gateway")
    write_routes(folder / "routes.json", {ROUTE: Route((Arm(NAME, 1),))})
    words = ["serve", "--port", str(port), "--backend-url", tiny_server.grpc_url, "--model", NAME]
    words += ["--routes", str(folder / "routes.json"), "--keys", str(folder / "keys.json")]
    kept, key = ApiKey.make("prometheus", expires=after_days(30))
    asyncio.run(open_store(str(folder / "keys.json")).add(kept))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "deepseek_triton.gateway", *words], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not is_ready(url):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield Gateway(url, key)
    finally:
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def ask_the_gateway(gateway: Gateway, is_over: Callable[[], bool]) -> None:
    """Streams, whole answers, and clients that leave, in rounds until it is over."""
    body: dict[str, Any] = {"model": ROUTE, "prompt": "The capital of France is", "max_tokens": 24}
    headers = {"Authorization": f"Bearer {gateway.key}"}
    with httpx.Client(base_url=gateway.url, timeout=60, headers=headers) as client:
        while True:
            assert client.post("/v1/completions", json=body).status_code == 200
            with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                assert list(answer.iter_lines())
            with client.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 400}) as answer:
                next(answer.iter_lines())  # and leaves
            assert client.post("/v1/completions", json=body | {"model": "absent"}).status_code == 404
            if is_over():
                return
            time.sleep(PAUSE_S)


@pytest.fixture(scope="package")
def watched(
    tiny_server: TritonServer, watched_gateway: Gateway, gpu_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus after the smoke profile, its rules evaluated each second."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    (port,) = free_ports(1)
    rules = files.rules()
    for group in rules["groups"]:
        group["interval"] = "1s"
    configuration = files.scrape_configuration()
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    metrics = tiny_server.metrics_url.split("/")[2]
    configuration["scrape_configs"] = [
        {"job_name": JOB, "static_configs": [{"targets": [metrics]}]},
        {
            "job_name": GATEWAY_JOB,
            "authorization": {"credentials": watched_gateway.key},
            "static_configs": [{"targets": [watched_gateway.url.rpartition("/")[2]]}],
        },
        {"job_name": "gpu", "static_configs": [{"targets": [f"127.0.0.1:{gpu_port}"]}]},
    ]
    (folder / "rules.yaml").write_text(files.to_yaml(rules), encoding="utf-8")
    (folder / "prometheus.yaml").write_text(files.to_yaml(configuration), encoding="utf-8")
    words = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    words += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with subprocess.Popen([program, *words], cwd=folder, stdout=subprocess.DEVNULL) as process:
        try:
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            prometheus.wait_until_ready(30)
            with ThreadPoolExecutor() as pool:
                smoke = pool.submit(run_smoke_profile, tiny_server, folder)
                ask_the_gateway(watched_gateway, smoke.done)
                smoke.result()
            yield prometheus
        finally:
            process.kill()
