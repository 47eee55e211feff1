from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from deepseek_triton.quick_imports import quick_imports
kept = [[] for _ in range(1000)]
try:
    with quick_imports():
        assert not gc.isenabled()
        raise ModuleNotFoundError("absent")
except ModuleNotFoundError:
    pass
frozen = gc.get_freeze_count()
assert gc.isenabled() and frozen > 1000
later = [[] for _ in range(1000)]
with quick_imports():
    assert gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() == frozen
gc.disable()
gc.unfreeze()
with quick_imports():
    pass
assert not gc.isenabled() and gc.get_freeze_count() == 0
"""


def test_imports_run_without_the_collector_once() -> None:
    """In a process of its own: this one's objects are frozen."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SHORT = """
import atexit, gc
from deepseek_triton.quick_imports import THRESHOLDS, collect_rarely
atexit.register(lambda: print(gc.get_freeze_count() > 1000))  # runs after what is registered later
collect_rarely()
assert gc.isenabled() and gc.get_threshold() == THRESHOLDS and not gc.get_freeze_count()
"""


def test_the_collector_looks_rarely_and_at_nothing_when_the_process_ends() -> None:
    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
