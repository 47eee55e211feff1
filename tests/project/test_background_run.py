"""Ctrl-C in a test run of the background (`nohup make test &`), whose processes inherit SIGINT ignored."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, subprocess, sys
from tests.conftest import pytest_configure
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
pytest_configure()
child = subprocess.Popen(["sleep", "30"])
child.send_signal(signal.SIGINT)
print(child.wait(20))
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_an_interrupt_reaches_a_test_and_what_it_starts() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    out, _ = process.communicate(timeout=60)
    assert out.split() == [str(-signal.SIGINT), "interrupted"]
