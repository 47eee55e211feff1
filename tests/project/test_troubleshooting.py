"""The errors that docs/getting-started.md explains are the code's own: each is provoked, and compared with its row."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.repository.sequence_len import choose_max_seq_len
from deepseek_triton.clients import GenerateRequest, GrpcClient
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from deepseek_triton.ensemble.server import installation
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.extras import explain_missing
from tests.ensemble.engine.test_engine import Engine
from tests.support.checkpoints import TINY, write_tiny
from tests.support.fakes import FakeRunner

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## When something goes wrong\n")[2].partition("\n## ")[0]
TEXTS = re.findall(r"^\| `(.+?)` \|", SECTION, re.MULTILINE)
Provoke = Callable[[Path, pytest.MonkeyPatch], object]


def missing_package(path: Path, patch: pytest.MonkeyPatch) -> None:
    raise Exception(explain_missing(ModuleNotFoundError(name="onnx")))


def no_server_installed(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "which", lambda name: None)
    patch.setattr(installation, "CONTAINER_BINARY", path / "none")
    patch.setattr(importlib.util, "find_spec", lambda name: None)
    installation.find_tritonserver()


def numpy_two(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(importlib.metadata, "version", lambda name: "2.3.0")
    installation._check_numpy()


def unknown_architecture(path: Path, patch: pytest.MonkeyPatch) -> None:
    from_hf({**TINY, "model_type": "made_up"})


def too_long(path: Path, patch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_tiny(path))
    choose_max_seq_len(BuildOptions(path, "m", path / "models", max_seq_len=100_000), checkpoint.spec)


def too_many_slots(path: Path, patch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_tiny(path))
    build_graph(checkpoint.spec, checkpoint.read, path, max_seq_len=16)
    OnnxRunner(path / "model.onnx", max_num_seqs=10**9)


def no_gpu(path: Path, patch: pytest.MonkeyPatch) -> None:
    # Read, not run: the runner needs torch's Triton compiler, and a machine without a GPU seldom has it.
    source = (ROOT / "ensemble" / "engine" / "runners" / "cuda" / "device.py").read_text(encoding="utf-8")
    raise Exception(re.findall(r'raise RunnerError\("(.+?)"\)', source))


def port_in_use(path: Path, patch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        TritonServer(path, http_port=listener.getsockname()[1]).start()


def no_server(path: Path, patch: pytest.MonkeyPatch) -> None:
    with GrpcClient("127.0.0.1:1", "m", timeout_s=5) as client:
        client.generate(GenerateRequest(prompt="x"))


def prompt_too_long(path: Path, patch: pytest.MonkeyPatch) -> None:
    Engine(FakeRunner(max_seq_len=8)).submit(list(range(8)))


def queue_full(path: Path, patch: pytest.MonkeyPatch) -> None:
    engine = Engine(FakeRunner(max_num_seqs=1), max_queue_size=1)
    for token in (1, 2):
        engine.submit([token], max_tokens=5)
        engine.step()
    engine.submit([3])


def built_before(path: Path, patch: pytest.MonkeyPatch) -> None:
    (path / "manifest.json").write_text('{"format": 1, "command": "deepseek-triton build a --name m"}')
    Manifest.load(path)


# In the order of the page's rows.
PROVOKED: tuple[Provoke, ...] = (
    missing_package, no_server_installed, numpy_two, unknown_architecture, too_long, too_many_slots, no_gpu,
    port_in_use, no_server, prompt_too_long, queue_full, built_before,
)  # fmt: skip


def test_the_page_explains_the_commonest_errors() -> None:
    assert len(TEXTS) == len(PROVOKED) >= 10


@pytest.mark.parametrize(
    ("text", "provoke"), list(zip(TEXTS, PROVOKED, strict=False)), ids=[f.__name__ for f in PROVOKED]
)
def test_an_error_is_what_the_page_shows(
    text: str, provoke: Provoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Exception) as caught:
        provoke(tmp_path, monkeypatch)
    pattern = ".+".join(re.escape(part) for part in text.split("…"))
    assert re.search(pattern, str(caught.value)), f"{text!r}: the code says {str(caught.value)!r}"
