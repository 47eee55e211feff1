"""After a crash, `serve` serves the same version again, even if a newer one was built meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.models.built import BuiltModel
from deepseek_triton.builders.repository.models.configure import configure
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.free_ports import free_ports
from tests.support.tuning import tiny_checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(find_spec("pytriton") is None, reason="no tritonserver"),
]


def make(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    build(BuildOptions(tiny_checkpoint(tmp_path), "m", models, max_seq_len=32))
    return models


class Served:
    """`deepseek-triton serve` as a process, and what it says."""

    def __init__(self, models: Path, log: Path, *more: str) -> None:
        self.ports = free_ports(3)
        self.models = models
        self.log = log
        words = [word for name, port in zip(("http", "grpc", "metrics"), self.ports, strict=True)
                 for word in (f"--{name}-port", str(port))]  # fmt: skip
        command = [sys.executable, "-m", "deepseek_triton.builders.cli", "serve", str(models), *words, *more]
        with log.open("w") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT)

    def ask(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.ports[0]}/v2/models/{path}", data=body, timeout=30) as answer:
            return json.loads(answer.read())

    def metrics(self) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.ports[2]}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def versions(self) -> list[str] | None:
        try:
            versions: list[str] = self.ask("m")["versions"]
        except (OSError, ValueError):
            return None
        return versions

    def triton(self) -> int:
        """The process id of tritonserver."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"/tritonserver") and str(self.ports[0]) in b" ".join(words).decode():
                return int(path.parent.name)
        raise AssertionError(f"no tritonserver runs:\n{self.log.read_text()}")

    def crash(self) -> None:
        os.kill(self.triton(), signal.SIGKILL)
        wait(lambda: self.versions() is None)
        wait(lambda: self.versions() is not None)


def wait(is_done: Callable[[], bool], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_done():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def begin(*more: str) -> Served:
        served = Served(make(tmp_path), tmp_path / "serve.log", *more)
        started.append(served)
        wait(lambda: served.versions() is not None or served.process.poll() is not None)
        assert served.process.poll() is None, served.log.read_text()
        return served

    yield begin
    for served in started:
        served.process.terminate()
        served.process.wait(60)


def test_a_crash_restart_serves_what_was_served_before(start: Callable[..., Served], tmp_path: Path) -> None:
    served = start()
    question = {"text_input": "hello", "max_tokens": 4}
    before = served.ask("m/generate", question)["text_output"]
    served.crash()
    assert served.versions() == ["1"] and "serving what was served before" not in served.log.read_text()

    build(BuildOptions(tmp_path / "tiny", "m", served.models, max_seq_len=64))
    configure(BuiltModel.read(served.models, "m"), {"max_queue_size": 7})
    served.crash()
    assert served.versions() == ["1"]
    assert served.ask("m/generate", question)["text_output"] == before
    text = served.log.read_text()
    assert (
        "serving what was served before; end and start `serve` to serve what is new: m had versions 1, now 1, 2" in text
    )


def test_serve_has_sent_each_model_a_first_request(start: Callable[..., Served]) -> None:
    served = start()
    wait(lambda: "Ctrl-C stops the server" in served.log.read_text())
    for line in (
        'deepseek_requests_total{model="m",version="1"} 1',
        'request_success{model="m-tokenizer",version="1"} 1',
    ):
        wait(partial(lambda wanted: wanted in served.metrics(), line), 20)
    assert "can't answer" not in served.log.read_text()


def test_a_crash_restart_serves_the_newest_where_it_is_told(start: Callable[..., Served], tmp_path: Path) -> None:
    served = start("--newest-after-crash")
    assert served.versions() == ["1"]
    build(BuildOptions(tmp_path / "tiny", "m", served.models, max_seq_len=64))
    served.crash()
    assert served.versions() == ["2"]
