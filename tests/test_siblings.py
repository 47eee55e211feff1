"""A served model's processes: none outlives the server that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# As Triton's server and one of its stubs: the child says who it is, then waits for what never comes.
SERVER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]])
"""
STUB = """
import os, sys, threading
from pathlib import Path
from ensemble.siblings import Watchdog
directory = Path(sys.argv[1])
Watchdog(directory / "tokenizer", [directory / "engine"]).start()
print(os.getpid(), flush=True)
threading.Event().wait()
"""


def test_a_process_whose_server_is_killed_ends_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, STUB, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        stub = int(server.stdout.readline())
        try:
            time.sleep(1)
            assert is_running(stub), "its server lives"
            server.kill()
            deadline = time.monotonic() + 20
            while is_running(stub):
                assert time.monotonic() < deadline, "it outlived its server"
                time.sleep(0.05)
        finally:
            server.kill()
            if is_running(stub):
                os.kill(stub, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """A zombie isn't: whoever adopted it may take a while to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
