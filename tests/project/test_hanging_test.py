"""A test that hangs: it fails with the stack of each thread, and the others run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANGING = """
import asyncio, ctypes, subprocess, threading
from collections.abc import Iterator
import pytest
from tests.conftest import _failed_tests_end_their_processes  # noqa: F401

@pytest.fixture
def endless() -> Iterator[None]:
    yield
    threading.Event().wait()

def test_a_fixture(endless) -> None: ...

def test_an_event_loop() -> None:
    asyncio.run(asyncio.Event().wait())

def test_a_thread() -> None:
    thread = threading.Thread(target=wait_for_nothing, daemon=True)
    thread.start()
    thread.join()

def wait_for_nothing() -> None:
    threading.Event().wait()

def test_a_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        process.wait(0.1)

def test_in_c() -> None:
    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)  # it keeps Python's global lock
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def test_another() -> None: ...
"""


@pytest.mark.slow
def test_a_test_that_hangs_fails_alone(tmp_path: Path) -> None:
    """The project's own limits, shorter: one that Python keeps, and one for C that never returns to Python."""
    (tmp_path / "test_hanging.py").write_text(HANGING)
    limits = ["-o", "timeout=2", "-o", "faulthandler_timeout=8"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), *limits,
               "-n", "1", "-p", "no:cacheprovider", "-p", "no:schemathesis", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=200)
    assert "4 failed, 2 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("Failed: Timeout (>2.0s) from pytest-timeout") >= 3
    assert "in wait_for_nothing" in done.stdout, "another thread than the test's"
    assert "subprocess.TimeoutExpired" in done.stdout
    assert "crashed while running 'test_hanging.py::test_in_c'" in done.stdout
    assert "in test_in_c" in done.stderr, "where it hangs"
