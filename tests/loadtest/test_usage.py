"""Who used the machine: known readings, and real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from deepseek_triton.loadtest.usage import Watch, course, highest_generator_core, local_port, server_processes, shares
from tests.support.loadtests import usage

BURN = """
import socket, subprocess, sys, time
listener = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
child.kill()
child.wait()
"""


def test_what_neither_generator_nor_server_used_was_others() -> None:
    part = shares(usage(0.0), usage(10.0, generator_s=1.0, server_s=12.0, others_s=4.0), 2, is_server_here=True)
    assert part is not None
    assert [part.generator, part.server, part.others] == pytest.approx([0.05, 0.6, 0.2])
    assert shares(usage(1.0), usage(1.0), 2, is_server_here=True) is None


def test_a_server_that_cannot_be_seen_cannot_be_told_from_others() -> None:
    before, after = usage(0.0, server_s=None), usage(10.0, server_s=None, others_s=4.0)
    here, elsewhere = (shares(before, after, 2, is_server_here=is_here) for is_here in (True, False))
    assert here is not None and (here.server, here.others) == (None, None)
    assert elsewhere is not None and elsewhere.server is None and elsewhere.others == pytest.approx(0.2)


def test_the_generators_busiest_stretch() -> None:
    readings = [usage(float(at), generator_s=max(0.0, min(at, 10) - 5) * 0.9) for at in range(21)]
    assert highest_generator_core(readings, 5.0) == pytest.approx(0.9)
    assert highest_generator_core(readings[:3], 5.0) == 0, "of a shorter run there is only the whole"
    assert highest_generator_core(readings[:1], 5.0) is None


def test_the_course_of_the_machine() -> None:
    readings = [usage(0.0), usage(1.0, server_s=1.0), usage(2.0, server_s=1.0, others_s=2.0)]
    steps = course(readings, [0.0, 1.0, 2.0], 2, is_server_here=True)
    assert steps.server_percent == [50, 0]
    assert steps.others_percent == [0, 100]
    assert steps.server_mib == [400, 400]
    assert course([], [0.0, 1.0], 2, is_server_here=True).others_percent == [None]


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("localhost:8001", 8001),
        ("127.0.0.1:8001", 8001),
        ("http://127.0.0.1:8000", 8000),
        ("10.0.0.7:8001", None),
        ("http://triton.example:8000", None),
    ],
)
def test_which_addresses_are_this_machines(url: str, port: int | None) -> None:
    assert local_port(url) == port


@pytest.mark.slow
def test_a_servers_children_are_its_own_and_what_they_use_is_not_others() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stdin is not None
        port = int(server.stdout.readline())
        found = server_processes(port)
        assert found[0].pid == server.pid and len(found) == 2
        watch = Watch(port)
        before = watch.read(0.0)
        assert before.server_s is not None
        for second in range(1, 60):
            time.sleep(1.0)
            after = watch.read(float(second))
            assert after.server_s is not None
            if after.server_s - before.server_s > 0.3:  # the child computes without a pause, as far as others let it
                break
        assert after.server_s is not None and after.server_s - before.server_s > 0.3
        assert after.busy_s - before.busy_s >= after.server_s - before.server_s - 0.05
        assert after.generator_s - before.generator_s < 0.2, "this process slept"
        assert after.server_bytes is not None and after.server_bytes > 5 * 2**20
        server.stdin.close()
        server.wait()
        assert watch.read(2.0).server_s is None, "it has gone"


def test_nobody_listens() -> None:
    assert server_processes(1) == []
    assert os.getpid() not in [process.pid for process in server_processes(0)]
    assert Watch(None).read(0.0).server_s is None
