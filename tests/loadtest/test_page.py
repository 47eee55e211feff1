"""Locust's own page, asked as a browser would, in front of the real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.free_ports import free_ports
from deepseek_triton.loadtest.result import load
from deepseek_triton.loadtest.status import Status
from tests.conftest import NAME
from tests.support.loadtests import missed_but_for_time

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "loadtest" / "profiles" / "smoke.toml"


def wait_for(answer: Any, limit_s: float = 60.0) -> Any:
    """What `answer()` gives as soon as it gives something."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            if found := answer():
                return found
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, f"nothing within {limit_s:g} s"
        time.sleep(0.1)


@pytest.mark.server
def test_a_run_is_started_and_seen_on_locusts_page(tiny_server: TritonServer, tmp_path: Path) -> None:
    short = tmp_path / "short.toml"
    text = PROFILE.read_text().replace("warmup_s = 3", "warmup_s = 1")
    short.write_text(text.replace("seconds = 20", "seconds = 4").replace("start = 1.0", "start = 3.0"))
    ports = {"http": tiny_server.http_port, "grpc": tiny_server.grpc_port, "metrics": tiny_server.metrics_port}
    options = [each for name, port in ports.items() for each in (f"--{name}-port", str(port))]
    page = free_ports(1)[0]
    command = [
        sys.executable, "-m", "deepseek_triton.loadtest.run", str(short), "--page", str(page), "--host", "127.0.0.1",
        "--model", NAME, *options, "--shared-machine", "--output", str(tmp_path / "output"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{page}", timeout=10, trust_env=False) as browser,
    ):
        try:
            home = wait_for(lambda: browser.get("/"))
            assert home.status_code == 200 and "Locust" in home.text
            assert f"http://127.0.0.1:{tiny_server.http_port}" in home.text, "what is loaded"
            for run in (1, 2):  # a second run begins anew
                started = browser.post("/swarm", data={"user_count": "1", "spawn_rate": "1"}).json()
                assert started["success"], started
                stopped = wait_for(
                    lambda: (stats := browser.get("/stats/requests").json())["state"] == "stopped" and stats
                )
                rows = {(row["method"], row["name"]): row for row in stopped["stats"]}
                whole = [row for (_, name), row in rows.items() if name == "whole answer"]
                result = load(wait_for(lambda: next(tmp_path.glob("output/result.json"), None)))
                assert sum(row["num_requests"] for row in whole) == len(result.samples) > 5, f"run {run}"
                assert sum(row["num_failures"] for row in whole) == 0
                assert any(name == "time to first token" for _, name in rows)
                assert missed_but_for_time(result) == []
                assert result.summary.num_complete == result.summary.num_requests
                (tmp_path / "output" / "result.json").unlink()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == Status.OK, "ending the page is how it is left"
        finally:
            process.kill()
