"""Progress on a terminal and in a file, and what an interrupt says."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.commands import progress
from deepseek_triton.builders.commands.progress import ProgressDisplay
from tests.support.checkpoints import make_tokenizer, write_tiny
from tests.support.terminal import terminal
from tests.support.tuning import tiny_checkpoint


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr("deepseek_triton.builders.commands.progress.time.monotonic", lambda: now[0])
    yield now


def test_a_file_gets_a_line_at_each_tenth_of_what_takes_long(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressDisplay() as shown:
        for done in range(1001):
            clock[0] = done * 0.1  # 10 s for each tenth
            shown.report("weights", done, 1000)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [f"weights: {tenth}0 %" for tenth in range(1, 11)]


def test_a_file_gets_no_line_on_what_is_quick_and_few_on_what_jumps(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressDisplay() as shown:
        for done in range(1001):
            shown.report("weights", done, 1000)
        for clock[0], layer in ((100.0, 1), (100.1, 2), (200.0, 3)):
            shown.report("quantize", layer, 3)
        shown.report("download", 0, 0)
    assert capsys.readouterr().err.splitlines() == ["quantize: 100 %"]


@pytest.mark.slow
def test_a_build_in_a_file_has_no_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", str(tiny_checkpoint(tmp_path)), "--name", "m", "--repository", str(tmp_path / "models")]
    assert cli.main(words) == 0
    err = capsys.readouterr().err
    assert "\r" not in err and "%|" not in err


def test_a_bar_never_shows_more_than_all_and_ends_full() -> None:
    class Shown(progress._Bar):
        def __init__(self) -> None:
            self.seen: list[int] = []
            self._bar: Any = self
            self.n = self.total = 0

        def update(self, done: int, total: int | None = None) -> None:  # tqdm's too
            if total is None:
                self.n += done
                self.seen.append(self.n)
            else:
                super().update(done, total)

        def close(self, *, is_done: bool | None = None) -> None:
            if is_done is not None:
                super().close(is_done=is_done)

    shown, bar = ProgressDisplay(), Shown()
    shown._shown, shown._what = bar, "weights"
    for done in (10, 90, 130):
        shown.report("weights", done, 100)
    assert bar.seen == [10, 90, 100]
    shown.close(is_done=True)
    other = Shown()
    shown._shown = other
    shown.report("weights", 40, 100)
    shown.close()
    assert other.seen == [40], "what broke off stays as it is"


def test_a_line_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as shown:
        shown.say("a\x1b[2Jb")
    assert capsys.readouterr().err == "a\\x1b[2Jb\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_says_what_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    models = tmp_path / "models"
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr("deepseek_triton.builders.repository.build.require_sound", interrupt)
    words = ["build", str(tiny_checkpoint(tmp_path)), "--name", "m", "--repository", str(models)]
    assert cli.main(words) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"interrupted: {models} is as it was; the same command builds from the beginning"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"], "nothing else stays"


@pytest.mark.slow
def test_an_interrupted_quantisation_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models, kept = tmp_path / "models", tmp_path / ".models-unfinished-m"

    def interrupt(*_: object) -> None:
        kept.mkdir()  # as a long quantisation does
        raise KeyboardInterrupt

    monkeypatch.setattr("deepseek_triton.builders.repository.build.require_sound", interrupt)
    words = ["build", str(tiny_checkpoint(tmp_path)), "--name", "m", "--repository", str(models)]
    assert cli.main(words) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"interrupted: {models} is as it was; the same command goes on from what is done, which {kept} keeps"


@pytest.mark.slow
def test_ctrl_c_on_a_terminal(tmp_path: Path) -> None:
    checkpoint = write_tiny(tmp_path / "big", vocab_size=320, hidden_size=256, intermediate_size=1024)
    make_tokenizer(checkpoint)
    with terminal(
        "build", str(checkpoint), "--name", "m", "--repository", str(tmp_path / "models"), "--precision", "fp8"
    ) as build:
        build.wait_for("on the processor", timeout_s=60)
        build.type("\x03")
        build.wait_for("interrupted: ", timeout_s=20)
        assert build.process.wait(20) == 130
    assert b"Traceback" not in build.screen
