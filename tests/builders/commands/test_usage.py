"""How the command line meets its user: help, versions, suggestions, output for programs and for quiet."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.commands.fit import describe
from deepseek_triton.builders.commands.models import suggest_model
from deepseek_triton.builders.commands.table import COMMANDS
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.clients.options import add_request_arguments
from deepseek_triton.ensemble.scoring.calibration import ProbabilityCalibration

HELP_S = 0.3


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The first of the two lines that wrong usage ends with."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    error, see = err.splitlines()
    command = arguments[0] if arguments[0] in COMMANDS else ""
    assert see == f"see: {' '.join(['deepseek-triton', command]).strip()} --help"
    return error.removeprefix("error: ")


def test_a_bare_call_prints_help_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert all(f"  {name}" in err for name in COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("deepseek-triton ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from deepseek_triton.builders.commands import parser

    made: list[parser.CommandParser] = []
    before = parser.CommandParser.print_help

    def keep(self: parser.CommandParser, file: Any = None) -> None:
        made.append(self)
        before(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser.CommandParser, "print_help", keep)
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: deepseek-triton {command}")
    requests = argparse.ArgumentParser()
    add_request_arguments(requests)
    sampling = {action.dest for action in requests._actions if not action.help}
    assert {action.dest for action in made[0]._actions if not action.help} <= sampling


def test_help_is_quick() -> None:
    program = "from deepseek_triton.builders.cli import main; main(['--help'])"
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < HELP_S


def test_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(capsys, "biuld") == "unknown command 'biuld'; did you mean build?"
    assert usage_error(capsys, "xyz") == "unknown command 'xyz'"
    assert usage_error(capsys, "--vesion") == "unknown option --vesion; did you mean --version?"
    assert usage_error(capsys, "build", "c", "--nam", "m") == "unknown option --nam; did you mean --name?"
    choice = usage_error(capsys, "build", "c", "--name", "m", "--target", "onxn")
    assert choice.startswith("argument --target: 'onxn' is not one of ") and choice.endswith("; did you mean onnx?")


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    error = usage_error(capsys, "generate", "m", "x", "--json-sch", "f")
    assert error == "unknown option --json-sch; did you mean --json-schema?"
    assert usage_error(capsys, "chat", "m", "--verbos").startswith("unknown option --verbos")


def test_a_model_that_was_meant(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suggest_model(built, "something-else")
    with pytest.raises(BuildError, match="has no model 'm2'; did you mean m"):
        suggest_model(built, "m2")
    assert cli.main(["tune", "mm", "--repository", str(built), "--p99-ms", "9"]) == 1
    assert capsys.readouterr().err == f"error: {built} has no model 'mm'; did you mean m?\n"


def test_a_fault_of_calibration_is_told() -> None:
    report = {"examples": 20.0}
    for name, before, after in (
        ("expected_calibration_error", 0.1, 0.2),
        ("negative_log_likelihood", 0.5, 0.4),
        ("accuracy", 0.9, 0.8),
    ):
        report |= {f"{name}_before": before, f"{name}_after": after}
    calibration = ProbabilityCalibration(
        ("a", "b"), 1.0, (0.0, 0.0), method="bias", normalisation="mean", report=report
    )
    last = describe(calibration).splitlines()[-1]
    assert last.startswith("beware: the calibration made worse: expected calibration error, accuracy; ")


def test_bash_completes_commands_options_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        program = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _deepseek_triton\n"
        program += 'printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("deepseek-triton", "co") == {"compare", "completion"}
    assert completed("deepseek-triton", "build", "--max-s") == {"--max-seq-len"}
    assert completed("deepseek-triton", "build", "c", "--target", "o") == {"onnx"}
    assert completed("deepseek-triton", "chat", "m", "--name") == set()


# Output for programs, and less of it


def test_check_in_json(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(built), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"repository": str(built), "problems": []}
    (built / "m-tokenizer" / "1" / "model.py").unlink()
    assert cli.main(["check", str(built), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["where"].endswith("model.py") and "is missing" in problem["what"]


def test_build_quietly_and_in_json(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["build", str(checkpoint), "--name", "m", "--repository", str(tmp_path / "models"), "-q"]
    arguments += ["--max-seq-len", "32", "--max-num-batched-tokens", "8", "--max-num-seqs", "2"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr() == (f"built {tmp_path / 'models' / 'm'}, version 1\n", "")
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["version"], told["path"]) == ("m", 2, str(tmp_path / "models" / "m"))


# serve


def test_serve_refuses_equal_ports_before_anything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(tmp_path), "--http-port", "9000", "--metrics-port", "9000"]) == 1
    assert capsys.readouterr().err == (
        "error: HTTP and metrics port are both 9000; give each its own (0: any free one)\n"
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_how_serve_ends(built: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int) -> None:
    def supervise(server: object, **_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr("deepseek_triton.ensemble.server.supervisor.supervise", supervise)
    assert cli.main(["serve", str(built)]) == status
