"""Ctrl-C at the worst moment: in a weak reference's callback, whose exceptions Python ignores."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `strike()` gets the signal inside such a callback, and returns as if nothing had been.
STRIKE = """
import os, signal, sys, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)

class Thing: ...

def strike(number=signal.SIGINT):
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
    del thing
    print("struck", flush=True)
"""
BUILDERS = """
import time
from types import SimpleNamespace
from deepseek_triton.builders import cli

def run(arguments):
    strike()
    time.sleep(60)

cli.parse = lambda argv: SimpleNamespace(verbose=False, run=run)
sys.exit(cli.main([]))
"""
SERVE = """
import time
from deepseek_triton.builders import cli
from deepseek_triton.builders.tune import repository

def finish_pending(*_):
    strike(signal.{number})
    time.sleep(60)

repository.finish_pending = finish_pending
sys.exit(cli.main(["serve", "nowhere", "--http-port=0", "--grpc-port=0", "--metrics-port=0"]))
"""
GATEWAY = """
import time
from deepseek_triton.gateway import cli

def serve(arguments):
    strike()
    time.sleep(60)

cli._serve = serve
sys.exit(cli.main(["serve"]))
"""
LOADTEST = """
from deepseek_triton.loadtest import run  # first: it patches the standard library
import gevent

def choose(*_):
    gevent.spawn_later(0.1, strike, signal.{number})  # in another greenlet
    gevent.sleep(60)

run.choose = choose
sys.exit(run.main(["smoke"]))
"""
PROGRAMS = {
    "a command": (BUILDERS, 130),
    "serve, Ctrl-C": (SERVE.format(number="SIGINT"), 130),
    "serve, SIGTERM": (SERVE.format(number="SIGTERM"), 0),
    "the gateway": (GATEWAY, 130),
    "a load test, Ctrl-C": (LOADTEST.format(number="SIGINT"), 130),
    "a load test, SIGTERM": (LOADTEST.format(number="SIGTERM"), 130),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_command_ends(name: str) -> None:
    program, status = PROGRAMS[name]
    if program.startswith("\nfrom deepseek_triton.loadtest") and importlib.util.find_spec("gevent") is None:
        pytest.skip("Locust is not installed")
    first, _, rest = program.partition("import gevent")
    code = f"{first}import gevent\n{STRIKE}{rest}" if rest else STRIKE + program
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert done.stdout == "struck\n" and done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


# A lock that nobody releases: as Ctrl-C leaves one between taking it and the block that would.
LOCK = """
import signal, threading, time
from deepseek_triton.interrupts import interrupts_end
signal.signal(signal.SIGINT, signal.default_int_handler)
lock = threading.RLock()
other = threading.Thread(target=lock.acquire)
"""


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOCK + code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )  # fmt: skip


def test_a_command_ends_though_a_lock_is_never_released() -> None:
    done = ended("""
with interrupts_end(0.2):
    other.start()
    other.join()
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        lock.acquire()
""")
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["error: interrupted, but a call doesn't end; this process ends without it"]


def test_a_command_that_ends_in_time_goes_on() -> None:
    done = ended("""
for _ in range(2):
    try:
        with interrupts_end(0.2):
            signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("interrupted")
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
time.sleep(0.5)
print("alive")
""")
    assert (done.returncode, done.stdout.split()) == (0, ["interrupted", "interrupted", "alive"]), done.stderr


def test_an_interrupted_command_ends_though_a_thread_of_its_own_does_not() -> None:
    """The interpreter waits for it at the process's end; the caller has waited long enough."""
    done = ended("""
import sys
from types import SimpleNamespace
from deepseek_triton import interrupts
from deepseek_triton.builders import cli

cli.end_within = lambda: interrupts.end_within(0.3)

def run(arguments):
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise KeyboardInterrupt

cli.parse = lambda argv: SimpleNamespace(verbose=False, run=run)
sys.exit(cli.main())
""")
    assert done.returncode == 130, done.stderr


def test_another_handler_of_ctrl_c_stays() -> None:
    done = ended("""
signal.signal(signal.SIGINT, lambda *_: print("its own"))
with interrupts_end(0.1):
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.4)
""")
    assert (done.returncode, done.stdout) == (0, "its own\n"), done.stderr


def test_what_else_is_ignored_is_told_as_before() -> None:
    code = """
from deepseek_triton.interrupts import interrupts_arrive
class Thing:
    def __del__(self):
        raise ValueError("told")
with interrupts_arrive():
    Thing()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "ValueError: told" in done.stderr
