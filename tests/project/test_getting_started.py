"""docs/getting-started.md: its three paths are walked with a small checkpoint, each as far as this machine lets.

Of a path, `make …`, `pip install …`, `. .venv/bin/activate` and `docker build …` are what the tests' environment has
done already (tests/project/test_package.py and test_dockerfile.py do them); everything else runs as it stands. `docker
run` of the builder runs as its entrypoint would, without the container. Without a GPU `serve` must end with one clear
line. With DEEPSEEK_TRITON_TRANSCRIPTS naming a folder, what each path showed is written there.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.project.test_dockerfile import STAGES
from tests.project.test_readme import Block, read_blocks
from tests.support.checkpoints import make_checkpoint, make_tokenizer
from tests.support.serve_command import shown_until_ready

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8")
DONE_ALREADY = ("make ", "pip install ", ". .venv/bin/activate", "docker build ")
LAPTOP, GPU, CONTAINER = re.findall(r"^## (.*(?:laptop|GPU machine).*)$", PAGE, re.MULTILINE)
PORTS = ("http", "grpc", "metrics")
# The usual port → where `serve` prints the address that stands for it here.
ADDRESSES = {"8000": r"http://(\S+?)/v2", "8001": r"--url (\S+)", "8002": r"http://(\S+)/metrics"}

pytestmark = pytest.mark.server


def section(title: str) -> list[Block]:
    return read_blocks(PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0])


class Walk:
    """A folder with a checkpoint where the page has one, and a shell in it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.ports: dict[str, str] = {}
        self._shown: list[str] = []
        command = folder / "bin" / "deepseek-triton"
        command.parent.mkdir()
        program = "from deepseek_triton.builders.cli import main\nraise SystemExit(main())\n"
        command.write_text(f"#!{sys.executable}\n{program}", encoding="utf-8")
        command.chmod(0o755)
        path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    def make_checkpoint(self, path: str) -> None:
        make_tokenizer(make_checkpoint(self.folder / path, "qwen2"))

    def run(self, line: str, status: int = 0) -> str:
        """Run a line of the page as it stands, but for the server's ports; returns what it showed."""
        own = re.sub(r"localhost:(800[012])", lambda match: self.ports[match[1]], line)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", own], cwd=self.folder, env=self.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        self.show(line, done.stdout)
        assert done.returncode == status, done.stdout
        return done.stdout

    @contextmanager
    def serve(self, line: str) -> Iterator[None]:
        """`deepseek-triton serve` on free ports, which then stand for the usual ones."""
        words = [*shlex.split(line), *(word for name in PORTS for word in (f"--{name}-port", "0"))]
        with subprocess.Popen(
            words, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                shown = shown_until_ready(process)
                for port, pattern in ADDRESSES.items():
                    found = re.search(pattern, shown)
                    assert found is not None
                    self.ports[port] = found[1]
                self.environment["DEEPSEEK_TRITON_URL"] = self.ports["8001"]
                self.show(line, "".join(shown.splitlines(keepends=True)[:5]) + "…\nCtrl-C stops the server\n")
                yield
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 130
            finally:
                process.kill()

    def show(self, line: str, output: str) -> None:
        self._shown.append(f"$ {line}\n{output.replace(str(self.folder), '~/deepseek-triton')}")

    def save(self) -> None:
        if folder := os.environ.get("DEEPSEEK_TRITON_TRANSCRIPTS"):
            (Path(folder) / f"{self.name}.txt").write_text("".join(self._shown), encoding="utf-8")


def checkpoint_path(blocks: list[Block]) -> str:
    (path,) = {str(match) for block in blocks for match in re.findall(r"path/to/DeepSeek-[\w.-]+", block.text)}
    return path


def ask(walk: Walk, blocks: list[Block]) -> None:
    """Run the blocks that ask the served model."""
    for block in blocks:
        if block.language == "python":
            program = walk.folder / "ask.py"
            program.write_text(block.text.replace("localhost:8001", walk.ports["8001"]), encoding="utf-8")
            assert walk.run("python ask.py").strip()
            continue
        for line in block.lines:
            if not line.startswith(DONE_ALREADY):
                shown = walk.run(line)
                assert shown.strip() or line.startswith("deepseek-triton chat"), line


def test_the_laptops_path(tmp_path: Path) -> None:
    first, own, *asking = section(LAPTOP)
    walk = Walk(tmp_path, "laptop")
    walk.make_checkpoint(checkpoint_path([own]))
    assert first.lines == ["make demo"], "what test_examples runs"
    *lines, serve = (line for line in own.lines if not line.startswith(DONE_ALREADY))
    for line in lines:
        walk.run(line)
    with walk.serve(serve):
        ask(walk, asking)
    walk.save()


def test_the_gpu_machines_path(tmp_path: Path) -> None:
    blocks = section(GPU)
    walk = Walk(tmp_path, "gpu-machine")
    walk.make_checkpoint(checkpoint_path(blocks))
    *lines, serve = (line for block in blocks for line in block.lines if not line.startswith(DONE_ALREADY))
    for line in lines:
        walk.run(line)
    assert (tmp_path / "model_repository" / "r1-engine" / "1" / "model.safetensors").stat().st_size > 0
    if has_gpu():
        with walk.serve(serve):
            ask(walk, section(LAPTOP)[2:])
    else:
        ports = " ".join(f"--{name}-port 0" for name in PORTS)
        shown = walk.run(f"{serve} {ports}", status=1).splitlines()
        cause = "torch sees no NVIDIA GPU here" if find_spec("triton") else "triton is not installed; run: pip install"
        errors = [line for line in shown if line.startswith("error: ")]
        assert len(errors) == 1 and shown[-1] == errors[0] and cause in errors[0], shown
    walk.save()


def test_the_containers_path_without_the_container(tmp_path: Path) -> None:
    blocks = section(CONTAINER)
    lines = [line for block in blocks for line in block.lines]
    builder, serve = (shlex.split(line) for line in lines if line.startswith("docker run "))
    for line in lines:
        assert set(re.findall(r"--target[ =](\S+)", line)) <= {*STAGES, "cuda"}
    images = {line.rpartition(" -t ")[2].split()[0] for line in lines if line.startswith("docker build ")}
    assert images == {"deepseek-triton-builder", "deepseek-triton"}
    assert serve[-1] == "deepseek-triton" and {"--gpus", "8000:8000", "8001:8001"} <= set(serve)
    walk = Walk(tmp_path, "container")
    walk.make_checkpoint(checkpoint_path(blocks))
    # What the entrypoint does in /data, which is this folder.
    arguments = builder[builder.index("deepseek-triton-builder") + 1 :]
    walk.run(shlex.join(["deepseek-triton", "build", *arguments]))
    walk.run("deepseek-triton check models")
    assert "$PWD/models:/models:ro" in serve
    walk.save()


def has_gpu() -> bool:
    torch = pytest.importorskip("torch")
    return bool(torch.cuda.is_available())
