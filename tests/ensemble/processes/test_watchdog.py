"""A served model's processes: none outlives the server that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_triton.ensemble.processes.child import stat_fields

ROOT = Path(__file__).parents[3]
# As Triton's server and one of its stubs, with the arguments that a stub gets. The stub says who it is, and that it is
# ready; then it waits for what never comes.
SERVER = """
import os, subprocess, sys
stub, directory, when = sys.argv[1:]
name = f"{directory}/triton_python_backend_stub"
subprocess.run([name, "-c", stub, directory, when, str(os.getpid())], executable=sys.executable)
"""
STUB = """
import os, sys, threading, time
from pathlib import Path
directory, when, server = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print(os.getpid(), flush=True)
while when == "late" and os.getppid() == server:
    time.sleep(0.05)
from deepseek_triton.ensemble.processes.watchdog import Watchdog
Watchdog(directory / "tokenizer", [directory / "engine"]).start()
threading.Event().wait()
"""


@pytest.mark.parametrize("when", ["early", "late"])  # late: the server dies before the stub begins to watch
def test_a_process_whose_server_is_killed_ends_by_itself(when: str, tmp_path: Path) -> None:
    # A Python that goes by another name must be told where its library is.
    environment = {**os.environ, "PYTHONHOME": sys.base_prefix, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, STUB, str(tmp_path), when],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
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
        return stat_fields(pid)[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
