"""A name that stands for another address is resolved again, without a new client."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.moved_server import LIMIT_S

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_server_that_moves_is_found_again(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.touch()
    mount = f"mount --bind {shlex.quote(str(hosts))} /etc/hosts"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here")
    words = f"{shlex.quote(sys.executable)} -m tests.support.moved_server {shlex.quote(str(hosts))}"
    command = ["unshare", "-m", "sh", "-c", f"{mount} && exec {words}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < LIMIT_S
