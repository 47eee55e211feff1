"""`deepseek-triton promote` as a process that is killed in each of its phases: the same command goes on."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.cli import main as deepseek_triton
from deepseek_triton.builders.lifecycle.digest import digest_of
from deepseek_triton.builders.lifecycle.gate.report import LimitVerdict, Report
from deepseek_triton.builders.lifecycle.promotion.route import arms_of, write_route
from deepseek_triton.builders.lifecycle.promotion.state import PROMOTED, RUNNING, Promotion, PromotionFile
from tests.builders.lifecycle.test_promote import FakeGateway, serving
from tests.support.byte_models import write_byte_model

HALT_S = 30.0  # in which a caller of a halting server is killed
CLI = [sys.executable, "-c", "import sys; from deepseek_triton.builders.cli import main; sys.exit(main())"]


@dataclass
class FakeTriton:
    """Triton's repository API over HTTP: what is loaded is a set of names. url: set while it serves.

    halts: the action that it begins and never answers, while its caller is killed.
    """

    loaded: set[str] = field(default_factory=lambda: {"r1"})
    loads: list[str] = field(default_factory=list)
    url: str = ""
    halts: str = ""
    has_halted: threading.Event = field(default_factory=threading.Event)

    def answer(self, path: str) -> Any:
        if path == "/v2/repository/index":
            return [{"name": name, "state": "READY"} for name in self.loaded]
        *_, model, action = path.split("/")
        if action == self.halts:
            self.has_halted.set()
            raise ConnectionAbortedError
        if action == "load":
            self.loads.append(model)
            self.loaded.add(model)
        else:
            self.loaded.discard(model)
        return {}


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    fake = FakeTriton()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            try:
                body = json.dumps(fake.answer(self.path)).encode()
            except ConnectionAbortedError:
                threading.Event().wait(HALT_S)
                self.close_connection = True
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False  # one may halt

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield fake
        server.shutdown()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """models: a repository with r1. candidate: other weights, and report: the gate's, which let them pass."""
    directory = tmp_path_factory.mktemp("promote")
    for name, seed in (("base", 0), ("candidate", 1)):
        write_byte_model(directory / name, seed)
    repository = str(directory / "models")
    assert deepseek_triton(["build", str(directory / "base"), "--name=r1", f"--repository={repository}", "-q"]) == 0
    sha256 = digest_of(open_checkpoint(directory / "candidate"))
    verdict = LimitVerdict("old_data", True, "1", "1", "0", "")
    Report({"name": "c", "sha256": sha256}, {"name": "b", "sha256": ""}, (verdict,), {}, (), "", "").save(
        directory / "report"
    )
    yield directory
    shutil.rmtree(directory)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", ["building r1-v2", "loading r1-v2", "r1-v2 has 1 %", "r1-v2 has 50 %", "r1-v2 has 100 %", "unloading r1"]
)
def test_the_same_command_goes_on_after_a_kill(line: str, built: Path, triton: FakeTriton, tmp_path: Path) -> None:
    repository, routes = tmp_path / "models", tmp_path / "routes.json"
    shutil.copytree(built / "models", repository)
    with serving(FakeGateway(routes)) as gateway:
        command = [
            *CLI, "promote", "r1", str(built / "candidate"), f"--report={built / 'report'}",
            f"--repository={repository}", f"--routes={routes}", f"--gateway={gateway}", f"--server={triton.url}",
            "--shares=1,50,100", "--stage-s=0", "--max-stage-s=60", "--build",
        ]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            shown = [one for one in iter(process.stderr.readline, "") if _killed_at(line, one, process)]
        assert process.returncode == -9 and line in shown[-1], shown
        killed = PromotionFile(repository, "r1").load()
        assert killed is not None and killed.status == RUNNING
        asked = {model for model, weight in arms_of(routes, "r1").items() if weight}
        assert asked <= triton.loaded <= {"r1", "r1-v2"}
        again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and "r1-v2 answers r1" in again.stdout, again.stderr
    assert triton.loaded == {"r1-v2"} and triton.loads == ["r1-v2"]
    assert [path.name for path in (repository / "r1-v2-engine").iterdir() if path.name.isdigit()] == ["1"]
    assert arms_of(routes, "r1") == {"r1": 0.0, "r1-v2": 100.0}
    assert not list(tmp_path.glob(".models-r1-v2-*"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["load", "unload"])
def test_a_rollback_goes_on_after_a_kill(moment: str, built: Path, triton: FakeTriton, tmp_path: Path) -> None:
    """Killed while Triton loads the old model, and while it unloads the new one."""
    repository, routes = tmp_path / "models", tmp_path / "routes.json"
    repository.mkdir()
    write_route(routes, "r1", {"r1": 0.0, "r1-v2": 100.0}, "caller")
    PromotionFile(repository, "r1").save(Promotion("r1", "r1", "r1-v2", "1", PROMOTED, 100.0))
    triton.loaded, triton.halts = {"r1-v2"}, moment
    command = [*CLI, "rollback", "r1", f"--repository={repository}", f"--routes={routes}", f"--server={triton.url}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert triton.has_halted.wait(60)
        process.kill()
    assert process.returncode == -9
    triton.halts = ""
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and "r1 answers r1" in again.stdout, again.stderr
    assert triton.loaded == {"r1"} and arms_of(routes, "r1") == {"r1": 100.0, "r1-v2": 0.0}
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 1  # nothing is left


def _killed_at(line: str, shown: str, process: subprocess.Popen[str]) -> bool:
    """Kill the process, as nothing can prevent, if it has shown the line. Always true."""
    if line in shown:
        process.kill()
    return True
