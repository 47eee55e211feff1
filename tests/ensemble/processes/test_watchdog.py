"""A served model's processes: none outlives the server that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from deepseek_triton.ensemble.processes.stat import stat_fields
from deepseek_triton.ensemble.processes.watchdog import meeting_point

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


@pytest.mark.slow
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
            deadline = time.monotonic() + 60
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


@pytest.mark.slow
def test_containers_that_share_tmp_keep_their_files_apart(tmp_path: Path) -> None:
    """In another one the same process id is another process's, or none, whose files would be removed."""
    prefix = ["unshare", "--user", "--map-user", str(os.getuid()), "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine doesn't let a process have its own process ids")
    code = "from deepseek_triton.ensemble.processes import watchdog as w; print(w.meeting_point('m', 1, 'w', 7).parent)"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    parents = [
        subprocess.check_output([*before, sys.executable, "-c", code], env=environment, text=True).strip()
        for before in ([], [], prefix)
    ]
    assert parents[0] == parents[1] and parents[0] != parents[2]


def test_processes_meet_in_one_place_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = meeting_point("model", 1, "key", 7)
    monkeypatch.setattr(tempfile, "tempdir", "/elsewhere")  # what gettempdir() falls back to without space
    assert meeting_point("model", 1, "key", 7) == before and before.parent.parent == tmp_path
