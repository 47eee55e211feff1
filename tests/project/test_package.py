"""The wheel that `make dist` makes, in an environment that has nothing else: every command, from another folder.

In one environment the wheel is alone: help is there, and what a command lacks is named with the command that installs
it. In another its extras are installed too, and the commands do their work with a small checkpoint and a real
tritonserver.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepseek_triton.builders.commands.table import COMMANDS
from tests.project.test_layout import checkout
from tests.support.checkpoints import make_checkpoint, make_tokenizer
from tests.support.environments import PIP_SETTINGS, make_environment
from tests.support.serve_command import shown_until_ready
from tests.support.syntax import parse_source

ROOT = Path(__file__).parents[2]
PACKAGE = "deepseek_triton"
FOLDERS = ("builders", "clients", "ensemble", "examples", "gateway", "loadtest")
PROGRAMS = ("run", "basis", "report")  # python -m deepseek_triton.loadtest.…
CHECKPOINT = "DeepSeek-R1-Distill-Qwen-1.5B"
EXTRAS = "build,client,serve,load"
RUNTIME = "nvidia-pytriton==0.7.0"
MISSING = r"^error: [\w.]+ is not installed; run: pip install '.*\.whl\[\w+\]'$"
# A command line of each command that can't do its work without an extra.
LACKING = {
    "build": ("checkpoint", "--name", "m"),
    "check": (),
    "serve": (),
    "generate": ("m", "text"),
    "chat": ("m",),
    "score": ("m", "text"),
    "evaluate": ("checkpoint", "--text", "text"),
    "fit": ("m", "examples"),
    "tune": ("m", "--p99-ms", "9"),
}
PROFILE = """
description = "two seconds"
arrivals = "open"
seed = 1
warmup_s = 0.5
timeout_s = 30
stages = [{ seconds = 2, start = 2.0, end = 2.0 }]
protocols = { grpc-stream = 1, http = 1 }
levels = { max_error_ratio = 0 }
[requests]
form = "text"
prompt_words = { median = 4, sigma = 0.1, least = 2, most = 8 }
answer_tokens = { median = 4, sigma = 0.1, least = 2, most = 8 }
"""
PYTHON_CLIENT = """
from deepseek_triton.clients import GenerateRequest, GrpcClient
with GrpcClient({url!r}, "r1") as client:
    print(client.generate(GenerateRequest(prompt="hello", max_tokens=4)).num_output_tokens)
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("package")]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` writes, made with the tests' own environment."""
    directory = tmp_path_factory.mktemp("dist")
    command = ["make", "dist", f"VENV={sys.prefix}", f"DIST={directory}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return directory


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def product_files() -> set[str]:
    """What a commit has of the importable package, by the names that it is installed under."""
    own = {str(path) for path in checkout() if path.parts[0] == PACKAGE and not (ROOT / path).is_symlink()}
    return own | {f"{PACKAGE}/{path}" for path in checkout() if path.parts[0] in FOLDERS}


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    compiled = {name for name in names if name.endswith(".so")}
    assert names - compiled == product_files()
    assert {Path(name).name for name in compiled} == ({"_blocks.abi3.so"} if shutil.which("cc") else set())


def test_without_a_compiler_the_package_is_installed_all_the_same(dist: Path, tmp_path: Path) -> None:
    (source,) = dist.glob("*.tar.gz")
    if uv := shutil.which("uv", path=str(Path(sys.executable).parent)):  # the same build, in a third of pip's time
        command = [uv, "build", "-q", "--wheel", "--out-dir", str(tmp_path), str(source)]
    else:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(command, env={**os.environ, "CC": "false"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == product_files()


def test_the_sdist_has_real_folders(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members if member.isfile()}
    assert product_files() <= names


def test_the_metadata_say_what_is_true(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        header = archive.read(name).decode().partition("\n\n")[0]
    version = re.search(r"^Version: (.+)$", header, re.MULTILINE)
    assert version is not None
    assert re.search(
        rf"^## {re.escape(version[1])}$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.10", "License-File: LICENSE"):
        assert f"{line}\n" in header
    assert header.count("\nClassifier: ") > 5
    found = [path for path in checkout() if path.suffix == ".py" and path.parts[0] != "tests"
             and version[1] in {node.value for node in ast.walk(parse_source((ROOT / path).read_text(encoding="utf-8")))
                                if isinstance(node, ast.Constant)}]  # fmt: skip
    assert found == [], "pyproject.toml alone has the version"


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and a folder to work in that has nothing of the checkout."""

    prefix: Path
    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DEEPSEEK"))}
        return {
            **kept,
            **PIP_SETTINGS,
            "PATH": f"{self.prefix / 'bin'}{os.pathsep}{kept['PATH']}",
            "VIRTUAL_ENV": str(self.prefix),
        }

    def install(self, *what: str) -> None:
        done = self.run("python", "-m", "pip", "install", "-q", *what)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def run(self, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.prefix / "bin" / command[0]), *command[1:]],
            cwd=self.folder, env=self.variables, input=text, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def succeed(self, *command: str, text: str = "") -> str:
        done = self.run(*command, text=text)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


def empty_environment(root: Path, *, with_uv: bool) -> Environment:
    make_environment(root / "venv", with_uv=with_uv)
    (root / "folder").mkdir()
    return Environment(root / "venv", root / "folder")


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """The wheel and the one package that it always needs, as pip itself installs them."""
    environment = empty_environment(tmp_path_factory.mktemp("alone"), with_uv=False)
    environment.install(str(wheel))
    yield environment
    shutil.rmtree(environment.prefix)


@pytest.fixture(scope="module")
def whole(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """What a laptop needs to build, serve, ask and load."""
    environment = empty_environment(tmp_path_factory.mktemp("whole"), with_uv=True)
    environment.install(f"{wheel}[{EXTRAS}]", "numpy<2")
    environment.install("--no-deps", RUNTIME)
    yield environment
    shutil.rmtree(environment.prefix)  # hundreds of MB


@pytest.fixture(scope="module")
def repository(whole: Environment) -> Path:
    checkpoint = make_tokenizer(make_checkpoint(whole.folder / CHECKPOINT, "qwen2"))
    whole.succeed("deepseek-triton", "build", checkpoint.name, "--name", "r1")
    score = ("--task", "score", "--labels", "good,bad", "--template", "{text}")
    whole.succeed("deepseek-triton", "build", checkpoint.name, "--name", "judge", *score)
    return whole.folder / "model_repository"


@pytest.fixture(scope="module")
def urls(whole: Environment, repository: Path) -> Iterator[dict[str, str]]:
    """The addresses of `deepseek-triton serve`, by protocol; SIGTERM ends it with 0."""
    command = [str(whole.prefix / "bin" / "deepseek-triton"), "serve"]
    ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
    with subprocess.Popen(
        [*command, *ports], cwd=whole.folder, env=whole.variables, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            shown = shown_until_ready(process)
            grpc, http = re.search(r"--url (\S+)", shown), re.search(r"http://([\d.:]+)/v2", shown)
            metrics = re.search(r"metrics: http://([\d.:]+)/metrics", shown)
            assert grpc and http and metrics, shown
            yield {"grpc": grpc[1], "http": http[1], "metrics": metrics[1]}
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_extra(alone: Environment, command: str) -> None:
    assert f"usage: deepseek-triton {command}" in alone.succeed("deepseek-triton", command, "--help")


def test_what_needs_no_extra_works(alone: Environment, wheel: Path) -> None:
    assert alone.succeed("deepseek-triton", "--version") == f"deepseek-triton {wheel.name.split('-')[1]}\n"
    assert "complete -o default -F _deepseek_triton deepseek-triton" in alone.succeed("deepseek-triton", "completion")
    alone.succeed("python", "-c", "import deepseek_triton.clients")


@pytest.mark.parametrize("command", LACKING)
def test_what_is_missing_is_named_with_the_command_that_installs_it(alone: Environment, command: str) -> None:
    done = alone.run("deepseek-triton", command, *LACKING[command])
    assert done.returncode == 1 and re.fullmatch(MISSING, done.stderr.strip()), done.stdout + done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_load_tests_programs_end_with_a_line(alone: Environment, program: str) -> None:
    done = alone.run("python", "-m", f"{PACKAGE}.loadtest.{program}", "absent.json")
    assert done.returncode == 1 and re.fullmatch("error: .+", done.stderr.strip()), done.stderr


@pytest.mark.server
def test_a_repository_is_built_and_sound(whole: Environment, repository: Path) -> None:
    assert whole.succeed("deepseek-triton", "check").strip() == f"{repository.name}: sound"


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_served_models_answer(whole: Environment, urls: dict[str, str], protocol: str) -> None:
    where = ("--url", urls[protocol], "--protocol", protocol)
    answer = whole.succeed("deepseek-triton", "generate", "r1", "hello", "--max-tokens", "4", "--json", *where)
    assert json.loads(answer)["num_output_tokens"] <= 4
    assert whole.succeed("deepseek-triton", "chat", "r1", "--max-tokens", "4", *where, text="hello\n")
    label = whole.succeed("deepseek-triton", "score", "judge", "hello", "--json", *where)
    assert json.loads(label)["label"] in ("good", "bad")


@pytest.mark.server
def test_a_program_asks_through_the_public_names(whole: Environment, urls: dict[str, str]) -> None:
    assert whole.succeed("python", "-c", PYTHON_CLIENT.format(url=urls["grpc"])).strip().isdigit()


@pytest.mark.server
def test_a_load_test_runs_and_is_compared(whole: Environment, urls: dict[str, str]) -> None:
    (whole.folder / "short.toml").write_text(PROFILE, encoding="utf-8")
    ports = [word for name, url in urls.items() for word in (f"--{name}-port", url.rpartition(":")[2])]
    run = ("python", "-m", f"{PACKAGE}.loadtest.run", "short.toml", "--model", "r1", "--host", "127.0.0.1")
    done = whole.run(*run, "--shared-machine", "--output", "load", *ports)
    # The machine may be too busy for a valid run (status 4); everything must have been answered.
    assert done.returncode in (0, 4), done.stdout + done.stderr
    assert re.search(r"short: (\d+) of \1 requests complete", done.stdout), done.stdout
    assert "wrote load/report.html" in whole.succeed("python", "-m", f"{PACKAGE}.loadtest.report", "load/result.json")
    assert "latency" in whole.succeed("deepseek-triton", "compare", "load/result.json", "load/result.json")


@pytest.mark.server
def test_the_quality_of_fp8_is_measured(whole: Environment, repository: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 6
    (whole.folder / "text.txt").write_text(text, encoding="utf-8")
    command = ("evaluate", CHECKPOINT, "--text", "text.txt", "--recipe", "nearest", "--tokens", "64", "--json")
    assert json.loads(whole.succeed("deepseek-triton", *command))["quality"]["num_tokens"] == 64
    done = whole.run("deepseek-triton", "fit", "judge", "text.txt")
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
