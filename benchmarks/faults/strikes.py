"""Each process in turn is killed or stopped, and the disk is full: seconds to the error and to the next answer."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.faults.served import Served
from deepseek_triton.ensemble.server.supervisor import SETTLED_S

STRUCK = ("tokenizer", "engine", "detokenizer", "tritonserver")
SIGNALS = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


def strike_all(served: Served) -> list[dict[str, Any]]:
    """Strike every process but the supervisor, with a request running."""
    return [strike(served, name, kind) for name in STRUCK for kind in SIGNALS]


def strike(served: Served, name: str, kind: str) -> dict[str, Any]:
    """Strike one process; the fields are seconds from the signal on."""
    ended: list[tuple[float, str]] = []

    def run() -> None:
        try:
            outcome = str(served.ask(text_input="1 2 3 4 5 6", max_tokens=900, end_id=-1).status_code)
        except httpx.HTTPError as error:
            outcome = type(error).__name__
        ended.append((time.monotonic(), outcome))

    time.sleep(SETTLED_S)
    running = threading.Thread(target=run)
    running.start()
    time.sleep(1.5)
    start = time.monotonic()
    os.kill(served.processes()[name], SIGNALS[kind])
    while served.is_ready():
        time.sleep(0.02)
    not_ready = time.monotonic() - start
    running.join()
    served.wait_for_answer()
    answered = time.monotonic() - start
    load_s = served.last_load_s()
    reason = next(line for line in reversed(served.lines) if "starting it again" in line)
    return {
        "process": name, "strike": kind, "seconds_to_error": round(ended[0][0] - start, 2), "outcome": ended[0][1],
        "seconds_to_not_ready": round(not_ready, 2), "seconds_to_next_answer": round(answered, 2),
        "load_s": round(load_s, 2), "beyond_load_s": round(answered - load_s, 2),
        "reason": reason.partition(" (log")[0],
    }  # fmt: skip


@contextmanager
def small_disk(mib: int) -> Iterator[Path]:
    """A directory with so much space; needs the right to mount."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", directory], check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "-l", directory], check=True)


def fill(directory: Path) -> Path:
    """Fill a disk to its last byte; returns the file to remove."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return path


def full_disk(repository: Path) -> list[dict[str, Any]]:
    """The disk of temporary files and of the log is full; then a process is killed, and space comes back."""
    found = []
    with small_disk(16) as directory, Served(repository, directory / "triton.log", directory) as served:
        for name in STRUCK:
            filler = fill(directory)
            status = served.ask().status_code
            start = time.monotonic()
            os.kill(served.processes()[name], signal.SIGKILL)
            time.sleep(10)
            is_ready_meanwhile = served.is_ready()
            filler.unlink()
            freed = time.monotonic()
            served.wait_for_answer()
            found.append({
                "process": name, "answer_on_a_full_disk": status, "ready_10_s_after_kill": is_ready_meanwhile,
                "seconds_from_space_to_answer": round(time.monotonic() - freed, 2),
                "seconds_from_kill_to_answer": round(time.monotonic() - start, 2),
            })  # fmt: skip
    return found
