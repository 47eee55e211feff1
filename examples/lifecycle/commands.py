"""The project's own commands as processes, which end with this one, however it ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from deepseek_triton.ensemble.processes.child import launch
from deepseek_triton.ensemble.processes.stat import stat_fields

PROGRAMS = {"deepseek-triton": "deepseek_triton.builders.cli", "deepseek-gateway": "deepseek_triton.gateway"}
GRACE_S = 20.0  # in which a program that was told to end does so
START_S = 300.0
POLL_S = 0.2


class StepError(Exception):
    """A command failed, or a server didn't start; one line."""


def run(words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> float:
    """Run a command to its end and print what it says; returns its seconds.

    log: a file, which is written anew. environment: more variables.

    Raises:
        StepError: its status isn't 0.
    """
    began = time.monotonic()
    process = start(words, log, environment)
    try:
        with log.open(encoding="utf-8", errors="replace") as file:
            while True:
                has_ended = process.poll() is not None
                for line in file.read().splitlines():
                    print(f"      {line}", flush=True)
                if has_ended:
                    break
                time.sleep(POLL_S)
    finally:
        end(process)
    if process.returncode:
        raise StepError(f"{words[0]} {words[1]} ended with status {process.returncode}; its output is in {log}")
    return time.monotonic() - began


def start(words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a command, which is shown as a person would type it."""
    print(f"    $ {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", PROGRAMS[words[0]], *words[1:]]
    return launch(command, {**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"}, log, GRACE_S)


def end(process: subprocess.Popen[bytes]) -> None:
    """Tell it to end, and wait until it has."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running(
    words: Sequence[str], log: Path, environment: Mapping[str, str], is_ready: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    """A server, from when it is ready to the end of the block.

    Raises:
        StepError: it ended, or isn't ready after `START_S`.
    """
    process = start(words, log, environment)
    try:
        deadline = time.monotonic() + START_S
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise StepError(f"{words[0]} {words[1]} didn't start; its output is in {log}")
            time.sleep(POLL_S)
        yield process
    finally:
        end(process)


def answers(url: str) -> bool:
    """Whether a GET of `url` has status 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def resident_mib(pid: int) -> float:
    """Memory of a process and all that it started: proportional set sizes, so that shared pages count once."""
    parents = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(directory.name)] = int(stat_fields(directory.name)[1])
    family, grown = {pid}, True
    while grown:
        found = {child for child, parent in parents.items() if parent in family} - family
        family, grown = family | found, bool(found)
    total = 0
    for member in family:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            text = Path(f"/proc/{member}/smaps_rollup").read_text(encoding="utf-8")
            total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024
