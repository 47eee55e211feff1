"""A launched command and its children: none outlives it, and it doesn't outlive its starter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_triton.ensemble.processes.child import launch
from tests.serving.test_server import group, wait_until

ROOT = Path(__file__).parents[3]
STARTER = """
import sys
from pathlib import Path
from deepseek_triton.ensemble.processes.child import launch
print(launch(["/bin/sh", "-c", sys.argv[1]], {}, Path(sys.argv[2]), grace_s=float(sys.argv[3])).pid, flush=True)
input()
"""
WITH_A_CHILD = "sleep 600 & echo started; "


def started(log: Path) -> Callable[[], bool]:
    return lambda: log.exists() and log.read_text() == "started\n"


def has_gone(leader: int) -> bool:
    return wait_until(lambda: group(leader) == [], 10.0)


def launch_and_kill_the_starter(script: str, log: Path, grace_s: float) -> tuple[int, float]:
    """The process group of what was started, and when its starter was killed."""
    command = [sys.executable, "-c", STARTER, script, str(log), str(grace_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as starter:
        assert starter.stdout is not None
        leader = int(starter.stdout.readline())
        assert wait_until(started(log))
        killed = time.monotonic()
        starter.send_signal(signal.SIGKILL)
    return leader, killed


def test_children_are_killed_when_the_command_ends_or_is_killed(tmp_path: Path) -> None:
    for number, (how, status) in enumerate((("exit 3", 3), ("kill -KILL $$", -signal.SIGKILL))):
        log = tmp_path / str(number)
        process = launch(["/bin/sh", "-c", WITH_A_CHILD + how], {}, log, grace_s=0)
        assert process.wait() == status and log.read_text() == "started\n"
        assert has_gone(process.pid), group(process.pid)


def test_a_command_that_the_signal_ends_ends_with_its_starter(tmp_path: Path) -> None:
    leader, killed = launch_and_kill_the_starter(WITH_A_CHILD + "wait", tmp_path / "log", grace_s=300)
    assert has_gone(leader), group(leader)
    assert time.monotonic() - killed < 30, "it waited for the grace's end"


@pytest.mark.slow
def test_one_that_ignores_the_signal_is_killed_after_the_grace(tmp_path: Path) -> None:
    script = "trap '' TERM; " + WITH_A_CHILD + "while :; do wait; sleep 0.1; done"
    leader, killed = launch_and_kill_the_starter(script, tmp_path / "log", grace_s=1)
    assert has_gone(leader), group(leader)
    assert time.monotonic() - killed >= 1


@pytest.mark.slow
def test_the_command_keeps_running_while_its_starter_does(tmp_path: Path) -> None:
    process = launch(["/bin/sh", "-c", WITH_A_CHILD + "wait"], {}, tmp_path / "log", grace_s=0)
    assert wait_until(started(tmp_path / "log"))
    time.sleep(0.5)
    assert len(group(process.pid)) == 3 and process.poll() is None, "the command, its child and the guard"
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert has_gone(process.pid), group(process.pid)
