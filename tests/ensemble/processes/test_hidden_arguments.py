"""Arguments that stand on no command line, and still reach the program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_triton.ensemble.processes.child import launch
from deepseek_triton.ensemble.processes.hidden_arguments import HiddenArgumentsError

SHOW = "import os, sys; print(sys.argv[1:], flush=True); print(open('/proc/self/cmdline').read().split(chr(0)))"


def test_a_hidden_argument_reaches_the_program_alone(tmp_path: Path) -> None:
    secret = "key=" + "s3cret" * 40
    command = [sys.executable, "-c", SHOW, "first", "key=hidden", "last"]
    environment = {"PYTHONHOME": sys.base_prefix, "LONG": "x" * 9000, "HIDDEN": secret, "LAST": "é"}
    process = launch(command, environment, tmp_path / "log", grace_s=0, hidden={"key=hidden": "HIDDEN"})
    assert process.wait(20) == 0
    got, shown = (tmp_path / "log").read_text().splitlines()
    assert got == str(["first", secret, "last"])
    assert "key=hidden" in shown and "s3cret" not in shown


@pytest.mark.slow
def test_it_is_started_under_gevent_too(tmp_path: Path) -> None:
    """A load test with --repository starts the server so."""
    pytest.importorskip("gevent")
    program = f"""
from gevent import monkey
monkey.patch_all()
import sys
from pathlib import Path
from deepseek_triton.ensemble.processes.child import launch
command = [sys.executable, "-c", {SHOW!r}, "key=hidden"]
environment = {{"PYTHONHOME": sys.base_prefix, "HIDDEN": "s3cret"}}
process = launch(command, environment, Path({str(tmp_path / "log")!r}), grace_s=0, hidden={{"key=hidden": "HIDDEN"}})
sys.exit(process.wait(20))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
    got, shown = (tmp_path / "log").read_text().splitlines()
    assert got == str(["s3cret"]) and "s3cret" not in shown


def test_a_program_that_can_t_be_started_says_so(tmp_path: Path) -> None:
    command = ["/nowhere/program", "key=hidden"]
    with pytest.raises(HiddenArgumentsError):
        launch(command, {"HIDDEN": "x"}, tmp_path / "log", grace_s=0, hidden={"key=hidden": "HIDDEN"})
    assert "can't start /nowhere/program" in (tmp_path / "log").read_text()


UNDER_GEVENT = f"""
import deepseek_triton.loadtest.gevent_patch
import sys
from pathlib import Path
from deepseek_triton.ensemble.processes.child import launch
command = [sys.executable, "-c", {SHOW!r}, "key=hidden"]
process = launch(command, {{"HIDDEN": "key=1"}}, Path(sys.argv[1]), grace_s=0, hidden={{"key=hidden": "HIDDEN"}})
sys.exit(process.wait(20))
"""


@pytest.mark.slow
def test_a_load_generator_hides_them_too(tmp_path: Path) -> None:
    """gevent, which a load test starts its server under, takes from other waiters what a child's stops tell."""
    pytest.importorskip("gevent")
    subprocess.run([sys.executable, "-c", UNDER_GEVENT, str(tmp_path / "log")], check=True, timeout=60)
    got, shown = (tmp_path / "log").read_text().splitlines()
    assert got == "['key=1']" and "key=hidden" in shown
