"""The pod's probes: against made-up metrics, and against a real server that runs and drains."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from deepseek_triton.clients import GenerateRequest, GrpcClient
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deploy.generate import FOLDER
from tests.conftest import NAME

PROBE = FOLDER / "chart" / "files" / "engine_probe.py"
MODELS = dict[str, dict[str, float]]


@pytest.fixture
def probe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("engine_probe", PROBE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clock:
    now = 1000.0

    def time(self) -> float:
        return self.now


def running(tokens: float, slots_used: float = 1) -> MODELS:
    return {"m": {"generated_tokens_total": tokens, "prompt_tokens_total": 5, "slots_used": slots_used}}


@pytest.mark.parametrize(
    ("readings", "is_alive"),
    [
        ([running(5), running(5), running(5)], False),
        ([running(5), running(5), running(6)], True),
        ([running(5, 0), running(5, 0), running(5, 0)], True),
        ([running(5), running(5, 0), running(5)], True),
        ([running(5), {}, running(5)], True),
    ],
    ids=["stalled", "slow", "idle", "idle between", "loaded again"],
)
def test_an_engine_must_get_on_while_sequences_run(
    probe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readings: list[MODELS], is_alive: bool
) -> None:
    clock = Clock()
    monkeypatch.setattr(probe.time, "time", clock.time)
    stalled: list[str] = []
    for models in readings:
        monkeypatch.setattr(probe, "read", lambda models=models: models)
        stalled = probe.alive(str(tmp_path / "state.json"), 100)
        clock.now += 60
    assert (stalled == []) is is_alive
    assert is_alive or stalled == ["m has computed no token for 120 s"]


def test_a_state_that_cannot_be_read_is_none(
    probe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state.json").write_text("{", encoding="utf-8")
    monkeypatch.setattr(probe, "read", lambda: running(5))
    assert probe.alive(str(tmp_path / "state.json"), 0.5) == []


@pytest.mark.slow
def test_draining_ends_at_its_limit(probe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "read", lambda: running(5))
    start = time.monotonic()
    probe.drain(0.2, network_s=0)
    assert 0.2 <= time.monotonic() - start < 30


def run_probe(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    """As the cluster runs it: nothing of this project can be imported."""
    command = [sys.executable, "-I", str(PROBE), *words]
    return subprocess.run(command, env={"METRICS_URL": url}, capture_output=True, text=True, timeout=60)


@pytest.mark.server
def test_a_real_server_is_alive_and_drains(
    tiny_server: TritonServer, probe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, state = tiny_server.metrics_url, str(tmp_path / "state.json")
    assert run_probe(url, "alive", state, "60").returncode == 0
    assert NAME in json.loads(Path(state).read_text(encoding="utf-8"))
    dead = run_probe("http://127.0.0.1:9/metrics", "alive", state, "60")
    assert dead.returncode == 1 and "127.0.0.1:9" in dead.stderr
    monkeypatch.setattr(probe, "URL", url)
    finished: list[float] = []

    def ask() -> None:
        with GrpcClient(tiny_server.grpc_url, NAME) as client:
            client.generate(GenerateRequest(prompt="hello", max_tokens=400, min_tokens=400))
        finished.append(time.monotonic())

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 20
    while not probe.read()[NAME]["slots_used"] and time.monotonic() < deadline and not finished:
        time.sleep(0.02)
    probe.drain(30, network_s=0)
    drained = time.monotonic()
    thread.join()
    assert finished and finished[0] < drained + 10  # its thread may be late
