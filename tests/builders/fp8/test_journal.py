"""A killed build goes on where it was, and makes what an undisturbed one makes, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.journal import BuildJournal, Section, journal_directory, subject_of
from deepseek_triton.builders.fp8.quantizer import Quantizer
from deepseek_triton.builders.fp8.texts import calibration_text
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from tests.support.checkpoints import make_checkpoint, make_tokenizer

# Each build is a process of its own, forked by one that has imported all: importing takes longer than a build.
KILLED_BUILDS = """
import json, os, signal, sys
from pathlib import Path
from deepseek_triton.builders.fp8.texts import calibration_text
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions

checkpoint, repository, texts, deaths = sys.argv[1:]
calibration_text.DATA, calibration_text.GENERATED_TOKENS = Path(texts), 8

options = BuildOptions(Path(checkpoint), "m", Path(repository), target="cuda", precision="fp8", max_seq_len=48)
for stage, step in json.loads(deaths):
    def report(what, done, total):
        if what == stage and (done > step if what == "weights" else done == step):
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        build(options, report)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGKILL, (stage, step, status)
"""
TEXT = "A killed build goes on where it was. " * 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("journal") / "checkpoint"
    return make_tokenizer(make_checkpoint(directory, "qwen2", dtype="bfloat16"))


@pytest.fixture(scope="module", autouse=True)
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A built-in set of a few lines, for a build of seconds."""
    directory = tmp_path_factory.mktemp("texts")
    (directory / "a.txt").write_text(TEXT)
    (directory / "chat.json").write_text("[]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_text, "DATA", directory)
        patch.setattr(calibration_text, "GENERATED_TOKENS", 8)
        yield directory


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that were quantised, not taken from the journal."""
    layers: list[int] = []
    original = Quantizer._quantize

    def counted(self: Any, layer: int, current: Any) -> None:
        original(self, layer, current)
        layers.append(layer)

    monkeypatch.setattr(Quantizer, "_quantize", counted)
    return layers


def options(checkpoint: Path, repository: Path, **changes: Any) -> BuildOptions:
    values: dict[str, Any] = {"target": "cuda", "precision": "fp8", "max_seq_len": 48, **changes}
    return BuildOptions(checkpoint, "m", repository, **values)


def digest(repository: Path) -> str:
    return hashlib.sha256((repository / "m-engine" / "1" / "model.safetensors").read_bytes()).hexdigest()


class Stopped(BaseException):
    """Ends a build as a signal would, but for the process."""


def stopping(what: str, done: int) -> Callable[[str, int, int], None]:
    def report(stage: str, number: int, total: int) -> None:
        if (stage, number) == (what, done):
            raise Stopped

    return report


@pytest.mark.slow
def test_an_interrupted_build_does_no_step_twice_and_makes_the_same_bytes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: list[int]
) -> None:
    build(options(checkpoint, tmp_path / "whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]  # nothing is left of a journal
    quantised.clear()
    repository = tmp_path / "models"
    for what, step in (("generate", 3), ("calibrate", 0), ("calibrate", 2), ("quantize", 1), ("quantize", 2)):
        with pytest.raises(Stopped):
            build(options(checkpoint, repository), stopping(what, step))
        if what != "generate":
            monkeypatch.setattr(calibration_text, "calibration_windows", None)
    assert journal_directory(repository, "m").is_dir()
    build(options(checkpoint, repository))
    assert quantised == [0, 1, 2]
    assert digest(repository) == digest(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "whole"]


@pytest.mark.slow
def test_layers_of_another_recipe_are_not_taken(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: list[int]
) -> None:
    with pytest.raises(Stopped):
        build(options(checkpoint, tmp_path / "models"), stopping("quantize", 2))
    quantised.clear()
    monkeypatch.setattr(calibration_text, "calibration_windows", None)  # the texts are
    build(options(checkpoint, tmp_path / "models", keep=("*.down_proj",)))
    assert quantised == [0, 1, 2]


def test_another_checkpoint_begins_anew(checkpoint: Path, tmp_path: Path) -> None:
    journal = BuildJournal(tmp_path / "j", subject_of(checkpoint, "here"))
    journal.section("calibrate", windows="a").save("layer-0", {"x": np.ones(3)})
    again = BuildJournal(tmp_path / "j", subject_of(checkpoint, "here"))
    kept = again.section("calibrate", windows="a").load("layer-0")
    assert kept is not None and kept["x"].sum() == 3
    os.utime(checkpoint / "config.json", ns=(1, 1))
    for other in (
        BuildJournal(tmp_path / "j", subject_of(checkpoint, "here")).section("calibrate", windows="a"),
        again.section("calibrate", windows="b"),
    ):
        assert other.load("layer-0") is None
    assert len(list((tmp_path / "j").iterdir())) == 1  # what fits no more is removed


def test_a_file_that_was_cut_short_counts_as_missing(tmp_path: Path) -> None:
    section = Section(tmp_path)
    section.save("a", {"x": np.arange(1000)})
    file = tmp_path / "a.npz"
    for length in (0, 10, 500, file.stat().st_size - 5):
        (tmp_path / "b.npz").write_bytes(file.read_bytes()[:length])
        assert section.load("b") is None
    assert Section().load("a") is None
    Section().save("a", {})


@pytest.mark.slow
def test_a_recipe_without_calibration_keeps_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        build(options(checkpoint, tmp_path / "models", recipe="fast"), stopping("quantize", 1))
    assert not journal_directory(tmp_path / "models", "m").exists()


@pytest.mark.slow
def test_a_build_that_is_killed_in_every_phase_makes_the_same_bytes(
    checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed" / "models"
    deaths = (("generate", 2), ("calibrate", 1), ("quantize", 0), ("quantize", 2), ("weights", 50000))
    words = [sys.executable, "-c", KILLED_BUILDS, *map(str, (checkpoint, killed, texts)), json.dumps(deaths)]
    done = subprocess.run(words, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for repository in (killed, tmp_path / "whole" / "models"):
        build(options(checkpoint, repository))
    assert digest(killed) == digest(tmp_path / "whole" / "models")


def test_an_error_names_what_to_do(tmp_path: Path, checkpoint: Path) -> None:
    from deepseek_triton.builders.fp8.calibrate import _load_taps

    with pytest.raises(BuildError, match="build again"):
        _load_taps(Section(tmp_path), 0)
