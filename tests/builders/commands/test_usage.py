"""The command line: help, version, suggestions, JSON output and -q."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.commands.fit import describe
from deepseek_triton.builders.commands.models import require_model
from deepseek_triton.builders.commands.table import COMMANDS
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.clients.options import add_request_arguments
from deepseek_triton.ensemble.scoring.calibration import ProbabilityCalibration

HELP_S = 0.3


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error's line of the two lines that wrong usage prints."""
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
    from deepseek_triton import command_parser as parser

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


def children_s() -> float:
    """CPU time of the processes that have ended: what else runs on the machine doesn't count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_help_is_quick() -> None:
    program = "from deepseek_triton.builders.cli import main; main(['--help'])"
    seconds = []
    for _ in range(5):
        start = children_s()
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        seconds.append(children_s() - start)
    assert min(seconds) < HELP_S


def test_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(capsys, "biuld") == "unknown command 'biuld'; did you mean build?"
    assert usage_error(capsys, "xyz") == "unknown command 'xyz'"
    assert usage_error(capsys, "--vesion") == "unknown option --vesion; did you mean --version?"
    assert usage_error(capsys, "build", "c", "--nam", "m") == "unknown option --nam; did you mean --name?"
    choice = usage_error(capsys, "build", "c", "--name", "m", "--target", "onxn")
    assert choice.startswith("argument --target: 'onxn' is not one of ") and choice.endswith("; did you mean onnx?")


def test_help_has_the_least_that_an_option_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    def told(command: str) -> str:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        return " ".join(capsys.readouterr().out.split())

    tune = told("tune")
    for option, least in (("--rounds N", "5"), ("--clients N", "1"), ("--max-tokens N", "1")):
        assert re.search(rf"{option} [^-]*at least {least} \(default", tune), option
    for option in ("--p99-ms MS", "--seconds S", "--budget-s S"):
        assert re.search(rf"{option} [^-]*above 0", tune), option
    assert "at least 1 (default: 2)" in told("prune-versions")
    assert re.search(r"--num-threads N [^-]*\(at most 1024; default: 0\)", told("build"))
    assert re.search(r"--tokenizer-instances N [^-]*\(at least 1; at most 64; default: 1\)", told("configure"))


def test_a_word_too_many_and_words_of_the_wrong_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error(capsys, "build", "a", "b", "--name", "m") == (
        "deepseek-triton build takes checkpoint alone; too much: b (a text with spaces needs quotes)"
    )
    assert usage_error(capsys, "generate", "m", "the", "capital", "of").startswith(
        "deepseek-triton generate takes model and prompt alone; too much: capital of"
    )
    assert usage_error(capsys, "completion", "b").startswith("deepseek-triton completion takes options alone")
    assert usage_error(capsys, "build", "c", "--name", "m", "--max-seq-len", "1e3") == (
        "argument --max-seq-len: '1e3' is not a whole number"
    )
    assert usage_error(capsys, "build", "c", "--name", "m", "--budget", "x").endswith("'x' is not a number")
    for words in (("build", "", "--name", "m"), ("list", ""), ("inspect", "m", "--repository", "")):
        assert usage_error(capsys, *words).endswith("the path is empty")


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    error = usage_error(capsys, "generate", "m", "x", "--json-sch", "f")
    assert error == "unknown option --json-sch; did you mean --json-schema?"
    assert usage_error(capsys, "chat", "m", "--verbos").startswith("unknown option --verbos")


@pytest.mark.slow
def test_a_model_that_was_meant(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_model(built, "m")
    with pytest.raises(BuildError, match="has no model 'm2'; did you mean m"):
        require_model(built, "m2")
    assert cli.main(["tune", "mm", "--repository", str(built), "--p99-ms", "9"]) == 1
    assert capsys.readouterr().err == f"error: {built} has no model 'mm'; did you mean m?\n"
    for command in ("inspect", "configure", "prune-versions"):
        assert cli.main([command, "something-else", "--repository", str(built)]) == 1
        assert capsys.readouterr().err == f"error: {built} has no model 'something-else'; there is m\n"
    with pytest.raises(BuildError, match="m-engine is a part of m: name m"):
        require_model(built, "m-engine")


def test_a_repository_without_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "m", "--repository", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("has no model 'm'; build one first, or name another --repository\n")
    assert cli.main(["inspect", "m", "--repository", str(tmp_path / "none")]) == 1
    assert "is not a directory; build a model first" in capsys.readouterr().err


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

    assert completed("deepseek-triton", "co") == {"compare", "completion", "configure"}
    assert completed("deepseek-triton", "configure", "--max-s") == set(), "only a build can change it"
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_how_serve_ends(built: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int) -> None:
    def supervise(server: object, **_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr("deepseek_triton.ensemble.server.supervisor.supervise", supervise)
    assert cli.main(["serve", str(built)]) == status


def test_serve_opens_the_port_for_old_clients_and_after_a_restart_again(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def supervise(server: Any, *, on_ready: Callable[[Any], None], **_: object) -> None:
        monkeypatch.setattr(type(server), "is_ready", lambda *_: False)
        for attribute in ("grpc_url", "http_url", "metrics_url"):
            monkeypatch.setattr(type(server), attribute, "127.0.0.1:9", raising=False)
        on_ready(server)
        on_ready(server)

    monkeypatch.setattr("deepseek_triton.ensemble.server.supervisor.supervise", supervise)
    assert cli.main(["serve", str(built), "--old-grpc-port", "0"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gRPC for old clients: ")]
    assert len(lines) == 2 and lines[0] == lines[1] and not lines[0].endswith(":0")
