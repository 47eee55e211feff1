"""What people are given to try: the commands that `serve` prints, and the demo itself."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from deepseek_triton.clients.examples import examples
from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer, find_tritonserver
from tests.conftest import NAME
from tests.support.checkpoints import smollm2_path

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
TITLES = ("gRPC", "HTTP", "Python")


def test_there_is_an_example_for_each_way_to_ask() -> None:
    assert tuple(examples("m", "http://localhost:8000", "localhost:8001")) == TITLES


@pytest.mark.parametrize("title", TITLES)
def test_an_example_works_as_pasted(server: TritonServer, tmp_path: Path, title: str) -> None:
    command = examples(NAME, server.http_url, server.grpc_url)[title]
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """scripts/demo.py, in an empty directory."""
    smollm2_path()
    try:
        find_tritonserver()
    except ServerError as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    yield module
    shutil.rmtree(tmp_path / "model_repository", ignore_errors=True)  # half a GB


def processes_in(directory: Path) -> list[str]:
    """The commands of the processes whose working directory is `directory`, this one aside."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.name != str(os.getpid()) and (process / "cwd").readlink() == directory:
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


def fixed_lines(text: str) -> list[str]:
    """What the demo says of itself: the model's words, figures and the progress bar left out."""
    return re.findall(r"^(?:\[\d/\d\]|built|      ready:|server).*", text, re.MULTILINE)


def test_the_demo_answers_cleans_up_and_builds_once(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.main() == 0
    output, progress = capsys.readouterr()
    assert "Paris" in output
    figures = re.search(r"^time to first token: (\d+) ms; (\d+\.\d) tokens/s$", output, re.MULTILINE)
    assert figures is not None and int(figures[1]) > 0 and float(figures[2]) > 0
    assert "linear layers, embedding and head: 210 Q4_1, 1 Q8_0" in progress
    assert output.index("Paris") < output.index("time to first token") < output.index("server stopped")
    deadline = time.monotonic() + 30  # processes of a killed stub end when they notice
    while processes_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_in(tmp_path) == []
    picture = (ROOT / "docs" / "answer.svg").read_text(encoding="utf-8")
    printed = fixed_lines("\n".join(re.findall(r"<text[^>]*>(.*?)</text>", picture)))
    assert len(printed) > 5
    assert set(printed) <= set(fixed_lines(output)), "the README's picture shows what make demo no longer prints"

    manifest = tmp_path / "model_repository" / f"{NAME}-engine" / "1" / "manifest.json"
    built_at = manifest.stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["demo.py", "--build-only"])
    assert demo.main() == 0
    assert "is there already" in capsys.readouterr().out
    assert manifest.stat().st_mtime_ns == built_at
    assert not (manifest.parents[1] / "2").exists()
