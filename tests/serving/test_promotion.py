"""A promotion under load, killed three times, on a real tritonserver behind a real gateway.

Nothing fails, every answer is a whole one of one of two models with other weights, and memory returns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.cli import main as deepseek_triton
from deepseek_triton.builders.lifecycle.digest import digest_of
from deepseek_triton.builders.lifecycle.gate.report import LimitVerdict, Report
from deepseek_triton.builders.lifecycle.promotion.route import write_route
from deepseek_triton.builders.lifecycle.promotion.triton_control import TritonControl
from deepseek_triton.ensemble.server.options import ADMIN_HEADER, ADMIN_KEY
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.examples.lifecycle.commands import resident_mib
from deepseek_triton.free_ports import free_ports
from tests.conftest import end_at_once
from tests.support.byte_models import write_byte_model
from tests.support.waiting import until

pytestmark = [pytest.mark.server, pytest.mark.slow]
NUM_CALLERS = 6
TOKENS = 12
PAUSE_S = 0.3  # of a caller between its requests: enough for load, and the commands get the processor
CLI = [sys.executable, "-m", "deepseek_triton.builders.cli"]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint, a candidate with other weights, and a repository with r1 built from the checkpoint."""
    for name, seed in (("checkpoint", 0), ("candidate", 1)):
        write_byte_model(tmp_path / name, seed)
    words = ["--name=r1", f"--repository={tmp_path / 'models'}", "--max-seq-len=256", "--max-num-batched-tokens=32"]
    assert deepseek_triton(["build", str(tmp_path / "checkpoint"), *words, "--quiet"]) == 0
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


class Load:
    """Callers that ask for r1 until the end. answers: caller, model, text. faults: what went wrong."""

    def __init__(self, url: str) -> None:
        self.answers: list[tuple[int, str, str]] = []
        self.faults: list[str] = []
        self._url, self._is_over = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(NUM_CALLERS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    @property
    def models(self) -> Counter[str]:
        """Which model answered, how often."""
        return Counter(model for _, model, _ in self.answers)

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._is_over.is_set():
                try:
                    self.answers.append((number, *ask(client, number)))
                except (AssertionError, httpx.HTTPError, ValueError, KeyError) as error:
                    self.faults.append(repr(error))
                time.sleep(PAUSE_S)


def ask(client: httpx.Client, number: int) -> tuple[str, str]:
    """The model that answers a caller, and its whole greedy answer."""
    body = {"model": "r1", "prompt": f"caller {number}", "max_tokens": TOKENS, "temperature": 0}
    answer = client.post("/v1/completions", json={**body, "stream": number % 2 == 0})
    assert answer.status_code == 200 and '"error"' not in answer.text, f"{answer.status_code} {answer.text[-400:]}"
    model = answer.headers["x-deepseek-model"]
    if number % 2:
        return model, answer.json()["choices"][0]["text"]
    *events, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert last == "[DONE]", answer.text
    return model, "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def killed_at(line: str, command: list[str], environment: dict[str, str]) -> None:
    """Run a command until it shows the line, and kill it then."""
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        shown = []
        for one in process.stderr:
            shown.append(one)
            if line in one:
                process.kill()
    assert process.returncode == -9, shown


def test_a_name_moves_to_its_candidate_and_back_under_load(directory: Path) -> None:
    if find_spec("pytriton") is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    repository, routes, report = directory / "models", directory / "routes.json", directory / "report"
    verdict = LimitVerdict("old_data", True, "1", "1", "0", "")
    sha256 = digest_of(open_checkpoint(directory / "candidate"))
    Report({"name": "c", "sha256": sha256}, {"name": "b", "sha256": ""}, (verdict,), {}, (), "", "").save(report)
    write_route(routes, "r1", {"r1": 100.0}, "request")
    names = ["r1", "r1-tokenizer", "r1-engine", "r1-detokenizer"]
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, models=names) as server:
        (port,) = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        words = ["serve", "--port", str(port), "--backend-url", server.grpc_url, "--routes", str(routes)]
        key = server.admin_headers[ADMIN_HEADER]
        environment = {**os.environ, ADMIN_KEY: key}
        log = (directory / "gateway.log").open("wb")
        gateway = subprocess.Popen(
            [sys.executable, "-m", "deepseek_triton.gateway", *words], stdout=log, stderr=log, env=environment
        )
        where = [f"--repository={repository}", f"--routes={routes}", f"--server={server.http_url}"]
        promote = [
            *CLI, "promote", "r1", str(directory / "candidate"), f"--report={report}", f"--gateway={url}", *where,
            "--shares=25,100", "--by=request", "--stage-s=1", "--max-stage-s=120", "--min-requests=10",
            "--max-error-rate=0", "--max-latency-ratio=50", "--build",
        ]  # fmt: skip
        try:
            _wait(url, gateway)
            control = TritonControl(server.http_url, key)
            with httpx.Client(base_url=url, timeout=120) as client:
                alone = {number: ask(client, number) for number in range(NUM_CALLERS)}
            with Load(url) as load:
                until(lambda: len(load.answers) >= 4 * NUM_CALLERS)  # what their requests take, the server has by then
                before = resident_mib(server.pid)
                for line in ("loading r1-v2", "r1-v2 has 25 %", "unloading r1"):
                    killed_at(line, promote, environment)
                ended = subprocess.run(promote, env=environment, capture_output=True, text=True, check=False)
                assert ended.returncode == 0, (ended.stderr, load.faults[:3])
                assert control.states()["r1-v2"] == "READY" and control.states()["r1-engine"] == "UNAVAILABLE"
                moved = load.models
                after = resident_mib(server.pid)
                rolled = subprocess.run([*CLI, "rollback", "r1", *where], env=environment, check=False)
                time.sleep(1)
            assert rolled.returncode == 0 and load.faults == []
            # Each caller has one whole answer of each model, and the old one's is what it gave before.
            texts = {(number, model): {text for *who, text in load.answers if who == [number, model]}
                for number in alone for model in ("r1", "r1-v2")}  # fmt: skip
            assert all(texts[number, "r1"] == {text} for number, (_, text) in alone.items())
            assert all(len(texts[number, "r1-v2"]) == 1 for number in alone)
            assert not [number for number in alone if texts[number, "r1"] & texts[number, "r1-v2"]]
            assert after < before * 1.2  # MiB: the old model's memory is the system's again
            assert min(moved["r1"], moved["r1-v2"]) >= 10 and load.models["r1"] > moved["r1"]
            assert server.exit_status is None
            end_at_once(server)
        finally:
            gateway.terminate()
            gateway.wait(30)
            log.close()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "the gateway didn't start"
        try:
            if httpx.get(f"{url}/health/live").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
