"""Who observes a process finds out that it has died or is frozen, and lets one alone that merely works hard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_triton.ensemble.processes import heartbeat
from deepseek_triton.ensemble.processes.heartbeat import (
    FROZEN_LOOKS,
    HUNG_LOOKS,
    ProcessObserver,
    StopObserver,
    beat,
    begin,
)


def process(code: str, path: Path) -> subprocess.Popen[str]:
    """A process that runs `code`, whose id stands in `path`; it has begun when this returns."""
    started = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{code}"], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    started.stdout.readline()
    path.write_text(str(started.pid))
    return started


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with process("import time; time.sleep(600)", tmp_path / "engine") as started:
        yield started
        started.kill()


def looks(observer: ProcessObserver, number: int, *, seconds: float = 0.0) -> list[str | None]:
    pause = threading.Event()
    return [pause.wait(seconds) or observer.fault() for _ in range(number)]  # type: ignore[misc]


def test_one_that_beats_is_well(idle: subprocess.Popen[str], tmp_path: Path) -> None:
    observer = ProcessObserver(tmp_path / "engine")
    for number in range(3 * FROZEN_LOOKS):
        os.utime(tmp_path / "engine", ns=(number, number))
        assert observer.fault() is None


def test_one_that_doesn_t_beat_is_frozen(idle: subprocess.Popen[str], tmp_path: Path) -> None:
    looks(observer := ProcessObserver(tmp_path / "engine"), 1)
    found = looks(observer, FROZEN_LOOKS, seconds=0.05)
    assert found == [None] * (FROZEN_LOOKS - 1) + ["is frozen"]


@pytest.mark.slow
def test_a_stopped_one_is_stopped_and_goes_on(idle: subprocess.Popen[str], tmp_path: Path) -> None:
    observer, server = ProcessObserver(tmp_path / "engine"), StopObserver(idle.pid)
    idle.send_signal(signal.SIGSTOP)
    assert looks(observer, FROZEN_LOOKS + 1, seconds=0.05)[-1] == "is stopped by a signal"
    assert [server.is_stopped() for _ in range(FROZEN_LOOKS)] == [False] * (FROZEN_LOOKS - 1) + [True]
    idle.send_signal(signal.SIGCONT)
    os.utime(tmp_path / "engine")
    threading.Event().wait(0.05)
    assert observer.fault() is None and not server.is_stopped()


@pytest.mark.slow
def test_one_that_worked_between_its_last_beat_and_the_signal_is_found_as_soon(tmp_path: Path) -> None:
    with process("while True: pass", tmp_path / "engine") as busy:
        observer = ProcessObserver(tmp_path / "engine")
        assert looks(observer, 3, seconds=0.1) == [None] * 3
        busy.send_signal(signal.SIGSTOP)
        found = looks(observer, FROZEN_LOOKS + 1, seconds=0.1)
        busy.kill()
    assert found[-1] == "is stopped by a signal"


def test_one_that_works_hard_is_given_longer(tmp_path: Path) -> None:
    with process("while True: pass", tmp_path / "engine") as busy:
        found = looks(ProcessObserver(tmp_path / "engine"), HUNG_LOOKS + 1)
        busy.kill()
    assert found == [None] * HUNG_LOOKS + ["is frozen"]


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        ("import os; os._exit(3)", "ended with status 3"),
        ("import os; os.abort()", "was killed by SIGABRT"),
    ],
)
def test_a_dead_one_has_its_true_reason(code: str, fault: str, tmp_path: Path) -> None:
    with process(code, tmp_path / "engine") as dead:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # a zombie until its status is read
        assert ProcessObserver(tmp_path / "engine").fault() == fault
    assert ProcessObserver(tmp_path / "engine").fault() == "has died"


def test_none_that_hasn_t_begun_or_has_ended_is_missed(tmp_path: Path) -> None:
    assert looks(ProcessObserver(tmp_path / "engine"), HUNG_LOOKS + 1) == [None] * (HUNG_LOOKS + 1)


def test_a_file_that_was_removed_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    begin(path)
    path.unlink()
    beat(path)
    assert path.read_text() == str(os.getpid())
    beat(tmp_path / "missing" / "engine")  # nowhere to write: no error


def test_signals_have_names() -> None:
    assert heartbeat.signal_name(9) == "SIGKILL" and heartbeat.signal_name(63) == "signal 63"
