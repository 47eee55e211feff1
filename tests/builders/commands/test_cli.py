from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.commands.table import make_command_parser
from deepseek_triton.builders.repository import build as repository
from deepseek_triton.builders.repository import check
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.server import tritonserver as server
from deepseek_triton.ensemble.server.installation import Installation, ServerError
from deepseek_triton.extras import install_command

SMALL_ENGINE = ("--max-seq-len", "32", "--max-num-batched-tokens", "8", "--max-num-seqs", "2")


class Run:
    """A command's exit status and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        self.status = cli.main([str(argument) for argument in arguments])
        self.out, self.err = capsys.readouterr()

    @property
    def error(self) -> str:
        """The one line that it ended with."""
        assert self.status == 1
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").removesuffix("\n")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *arguments: Run(capsys, *arguments)


@pytest.mark.slow
def test_build_then_check(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for version in (1, 2):
        result = run("build", checkpoint, "--name", "m", "--repository", models, *SMALL_ENGINE)
        first, took, serve, restart = result.out.splitlines()
        assert (result.status, first) == (0, f"built {models / 'm'}, version {version}")
        assert re.fullmatch(r"it took \d+\.\d s", took)
        assert serve == f"serve it with: deepseek-triton serve {models}"
        assert restart == f"a server that is running already must be restarted to serve version {version}"
        assert "weights" not in result.err and "error" not in result.err, "a file gets no progress bar"
    result = run("check", models)
    assert (result.status, result.out, result.err) == (0, f"{models}: sound\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name", "a/b"), "name is 'a/b'"),
        (("--name", "m", "--max-seq-len", "1000"), "max_seq_len is 1000, the model was trained for 64 tokens"),
        (("--name", "m", "--max-num-seqs", "0"), "max_num_seqs is 0, must be an integer of at least 1"),
        (("--name", "m", "--max-num-batched-tokens", "-1"), "max_num_batched_tokens is -1"),
        (("--name", "m", "--num-threads", "-1"), "num_threads is -1"),
    ],
)
def test_build_options_at_fault(
    run: Any, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    models = tmp_path / "models"
    assert message in run("build", checkpoint, "--repository", models, *arguments).error
    assert not models.exists()


def test_build_checkpoints_at_fault(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    def error(path: Path) -> str:
        text: str = run("build", path, "--name", "m", "--repository", tmp_path / "models", *SMALL_ENGINE).error
        return text

    assert "does not exist; give a Hugging Face directory, a .gguf file or" in error(tmp_path / "nowhere")
    (tmp_path / "x.gguf").write_bytes(b"GGUFGGUF")
    assert "x.gguf is not a readable GGUF file" in error(tmp_path / "x.gguf")
    (checkpoint / "tokenizer.json").write_text("{")
    assert "tokenizer.json is not a tokenizer" in error(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    assert "tokenizer.json does not exist" in error(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors ends inside" in error(checkpoint)


def test_an_interrupted_build_says_so_by_its_status(
    run: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, adapter: Path | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repository, "open_checkpoint", interrupt)
    assert run("build", checkpoint, "--name", "m", "--repository", tmp_path / "models").status == 130


@pytest.mark.parametrize(
    "arguments",
    [(), ("build",), ("build", "c"), ("build", "c", "--name", "m", "--target", "gpu"), ("serve", "--http-port", "x")],
)
def test_wrong_usage_is_status_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "deepseek-triton" in error and "--help" in error
    assert not arguments or (error.startswith("error: ") and error.count("\n") == 2), "no list of every option"


def test_defaults_are_the_dataclasses_own() -> None:
    arguments = cli.parse(["build", "c", "--name", "m"])
    helps = {action.dest: str(action.help) for action in make_command_parser("build")._actions}
    for field in fields(EngineSettings):
        assert getattr(arguments, field.name) is None, "the target's own"
        assert isinstance(field.default, bool) or f"default: {field.default}" in helps[field.name]
    options = BuildOptions(Path("c"), "m")
    for name in ("repository", "target", "max_seq_len"):
        assert getattr(arguments, name) == getattr(options, name)


def test_check_prints_every_problem(run: Any, built: Path) -> None:
    (built / "m-engine" / "1" / "model.onnx.data").unlink()
    (built / "m-tokenizer" / "1" / "model.py").unlink()
    result = run("check", built)
    assert result.status == 1
    assert result.out == f"{built}: 2 problems\n"
    lines = result.err.splitlines()
    assert len(lines) == 2
    assert "model.onnx.data: is missing; rebuild with: deepseek-triton build" in lines[0]
    assert "model.py: is missing" in lines[1]


def test_check_without_a_repository(run: Any, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nowhere", "is not a directory"), (tmp_path, "holds no built models")):
        result = run("check", path)
        assert result.status == 1 and message in result.err and "build" in result.err


# serve


def test_serve_a_repository_that_is_not_built(run: Any, tmp_path: Path) -> None:
    assert "is not a directory; build the model first" in run("serve", tmp_path / "nowhere").error
    # The demo's committed configuration alone is nothing that can be served.
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text('name: "m"')
    assert "holds no built models; build one first" in run("serve", tmp_path).error


def test_serve_an_unsound_repository(run: Any, built: Path) -> None:
    (built / "m-engine" / "1" / "model.onnx").unlink()
    assert "model.onnx: is missing; rebuild with: deepseek-triton build" in run("serve", built).error


def test_serve_without_a_tritonserver(run: Any, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> Installation:
        raise ServerError("no tritonserver on PATH; run: pip install it")

    monkeypatch.setattr(server, "find_tritonserver", find)
    assert run("serve", built).error == "no tritonserver on PATH; run: pip install it"


@pytest.mark.slow
def test_serve_on_a_port_in_use(run: Any, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_tritonserver", lambda: Installation(Path("/bin/false")))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for option in ("http", "grpc", "metrics"):
            ports = {name: 0 for name in ("http", "grpc", "metrics")} | {option: port}
            result = run("serve", built, *(word for name, n in ports.items() for word in (f"--{name}-port", n)))
            assert str(port) in result.error and "in use" in result.error


@pytest.mark.slow
def test_serve_with_a_server_that_ends_at_once(run: Any, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_tritonserver", lambda: Installation(Path("/bin/false")))
    result = run("serve", built, "--http-port", 0, "--grpc-port", 0, "--metrics-port", 0)
    assert result.error and str(built) in result.out


# What is not installed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("onnx", ("build", "c", "--name", "m"), "build"),
        ("ml_dtypes", ("build", "c", "--name", "m"), "build"),
        ("tritonclient", ("check", "models"), "client"),
        ("grpc", ("check", "models"), "client"),  # tritonclient[grpc] without its extra
        ("grpc", ("generate", "m", "hello"), "client"),
    ],
)
def test_a_missing_package_names_the_extra_that_has_it(
    module: str, command: tuple[str, ...], extra: str, tmp_path: Path
) -> None:
    # In an interpreter of its own: what this one has imported stays imported.
    program = f"""
import sys
sys.modules[{module!r}] = None
from deepseek_triton.builders.cli import main
sys.exit(main({list(command)!r}))
"""
    root = str(Path(cli.__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"error: {module}")
    assert result.stderr.endswith(f"; run: {install_command(extra)}\n")


def test_a_missing_module_of_nobody_s_extra_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> None:
        raise ModuleNotFoundError(
            "No module named 'deepseek_triton.ensemble.nothing'", name="deepseek_triton.ensemble.nothing"
        )

    monkeypatch.setattr(check, "check_repository", missing)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["check"])


@pytest.mark.slow
def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepseek_triton.builders.cli", "check", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(cli.__file__).parent.parent)
    assert result.returncode == 1 and "holds no built models" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--model", "m"], "unknown option --model: give the model without it"),
        (["serve", "r", "--port", "1"], "unknown option --port; did you mean --http-port?"),
        (["configure", "m", "--seqs", "1"], "unknown option --seqs; did you mean --max-num-seqs?"),
        (["tune", "m", "--minutes", "1"], "unknown option --minutes\n"),
    ],
)
def test_hints_are_given_where_they_help(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err
