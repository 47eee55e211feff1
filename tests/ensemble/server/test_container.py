"""What process 1 of a container does for tritonserver: the key, signals, exit statuses, dead processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.test_server import wait_until

ROOT = Path(__file__).parents[3]
MODULE = [sys.executable, "-m", "deepseek_triton.ensemble.server.container"]
KEY = "the-administrators-key"


def start(*command: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_ADMIN_KEY": KEY}
    return subprocess.Popen([*prefix, *MODULE, *command], env=environment, stdout=subprocess.PIPE, text=True)


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script, "tritonserver")


def test_the_program_gets_the_key_which_no_command_line_shows() -> None:
    with start(*shell('echo "$2"; cat /proc/$$/cmdline /proc/$PPID/cmdline'), "first") as process:
        shown, _ = process.communicate(timeout=20)
    first, _, rest = shown.partition("\n")
    assert first.startswith("--http-restricted-api=") and first.endswith(f"x-triton-admin={KEY}")
    assert "first" in rest and "hidden" in rest and KEY not in rest
    assert process.returncode == 0


@pytest.mark.parametrize(("end", "status"), [("exit 3", 3), ("kill -SEGV $$", 139), ("kill -KILL $$", 137)])
def test_the_status_is_the_programs(end: str, status: int) -> None:
    with start(*shell(end)) as process:
        assert process.wait(20) == status


def test_a_program_that_is_missing_is_told() -> None:
    with start("/nowhere/tritonserver") as process:
        assert process.wait(20) == 127


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_program_which_may_take_its_time(number: signal.Signals) -> None:
    with start(
        *shell("trap 'sleep 0.3; echo ended; exit 7' TERM INT; echo up; while :; do sleep 0.05; done")
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.read() == "ended\n"
        assert process.wait(20) == 7


EARLY = """
import os, signal, sys
from deepseek_triton.ensemble.server import container
reveal = container.reveal

def strike(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    reveal(*arguments)

container.reveal = strike
sys.exit(container.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_signal_that_comes_before_the_program_runs_reaches_it() -> None:
    command = shell("trap 'exit 7' TERM; while :; do sleep 0.05; done")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", EARLY, *command], env=environment) as process:
        # The program may not have begun to handle it: then the signal ends it, as it would end tritonserver.
        assert process.wait(20) in (7, 128 + signal.SIGTERM)


@pytest.mark.slow
def test_as_process_1_it_reaps_orphans_and_passes_signals_on() -> None:
    prefix = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine doesn't let a process have its own process ids")
    # The inner shell dies and leaves a child, which ends a little later as a child of process 1.
    orphans = "for i in 1 2 3; do sh -c 'sleep 0.3 &'; done; sleep 1"
    zombies = "echo zombies: $(grep -ls 'State:.Z' /proc/[0-9]*/status)"
    script = f"{orphans}; {zombies}; trap 'exit 7' TERM; echo parent $PPID; while :; do sleep 0.05; done"
    with start(*shell(script), prefix=prefix) as process:
        assert process.stdout is not None
        assert [process.stdout.readline(), process.stdout.readline()] == ["zombies:\n", "parent 1\n"]
        inner = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(inner[0]), signal.SIGTERM)
        assert process.wait(20) == 7
    assert wait_until(lambda: not Path(f"/proc/{inner[0]}").exists())
