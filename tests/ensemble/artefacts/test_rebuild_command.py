"""The command that rebuilds a model holds after a move of the repository, and in every directory."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.commands.build import read_options
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets import target_named, target_names
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.rebuild_command import at_repository, with_options
from tests.support.tuning import tiny_checkpoint


@pytest.mark.slow
def test_it_builds_again_in_another_directory_and_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    build(BuildOptions(Path("tiny"), "m", Path("models"), max_seq_len=32))
    monkeypatch.chdir(elsewhere)
    command = Manifest.load(tmp_path / "models" / "m-engine" / "1").command
    assert cli.main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "models" / "m-engine" / "2").is_dir() and list(elsewhere.iterdir()) == []

    moved = elsewhere / "other models"
    shutil.move(tmp_path / "models", moved)
    capsys.readouterr()
    (moved / "m-engine" / "2" / "model.onnx").unlink()
    assert cli.main(["check", str(moved)]) == 1
    line = next(line for line in capsys.readouterr().err.splitlines() if "rebuild with: " in line)
    assert cli.main(shlex.split(line.split("rebuild with: ")[1])[1:]) == 0
    assert (moved / "m-engine" / "3").is_dir() and not (tmp_path / "models").exists()


def test_every_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "build c --name m --precision fp8 --calibration-text t.txt --ranges r.json --memory 24 --repository models"
    command = read_options(cli.parse(words.split())).command()
    for path in ("c", "t.txt", "r.json", "models"):
        assert f" {tmp_path / path}" in command
    assert "--memory 24" in command
    assert read_options(cli.parse(shlex.split(command)[1:])).command() == command


def test_words_are_replaced_and_others_stay(tmp_path: Path) -> None:
    command = "deepseek-triton build '/my c' --name m --repository /old --batch-invariant --keep a --keep b"
    assert at_repository(command, tmp_path / "x" / "1") == command.replace("/old", str(tmp_path.resolve()))
    assert with_options(command, ["--batch-invariant", "--keep"], ["--keep", "c"]) == (
        "deepseek-triton build '/my c' --name m --repository /old --keep c"
    )
    for damaged in ("deepseek-triton build 'c", "deepseek-triton build c", "build --repository"):
        assert at_repository(damaged, tmp_path / "x" / "1") == damaged


@pytest.mark.parametrize("name", target_names())
def test_a_target_names_only_its_own_packages(name: str) -> None:
    others = {package for other in target_names() if other != name for package in target_named(other).packages}
    assert not set(target_named(name).packages) & (others - {"onnx"})
