from __future__ import annotations

import math
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deepseek_triton.ensemble.processes.acknowledgements import (
    BEAT_S,
    NUM_BEATS,
    PIPE_BYTES,
    AcknowledgementReceiver,
    AcknowledgementSender,
    pipe_path,
)
from tests.support.waiting import until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pipe"


@pytest.fixture
def receiver(path: Path) -> Iterator[AcknowledgementReceiver]:
    receiver = AcknowledgementReceiver(path)
    yield receiver
    receiver.close()


@pytest.fixture
def sender(path: Path) -> Iterator[AcknowledgementSender]:
    sender = AcknowledgementSender(path)
    yield sender
    sender.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_ids_arrive_in_order(receiver: AcknowledgementReceiver, sender: AcknowledgementSender) -> None:
    assert receiver.drain() == []
    sender.send([3, 1, 3])
    sender.send(iter([2**64 - 1]))
    sender.send([])
    assert receiver.drain() == [3, 1, 3, 2**64 - 1]
    assert receiver.drain() == []


def test_several_senders_share_a_pipe(receiver: AcknowledgementReceiver, path: Path) -> None:
    senders = [AcknowledgementSender(path) for _ in range(3)]
    for round_number in range(4):
        for number, sender in enumerate(senders):
            sender.send([number * 10 + round_number] * 64)
    received = receiver.drain()
    assert len(received) == 3 * 4 * 64
    # A message is never torn apart: ids come in blocks of 64 equal ones.
    blocks = [set(received[i : i + 64]) for i in range(0, len(received), 64)]
    assert all(len(block) == 1 for block in blocks)
    for sender in senders:
        sender.close()


def test_only_this_user_may_write(receiver: AcknowledgementReceiver, path: Path) -> None:
    mode = path.stat().st_mode
    assert stat.S_ISFIFO(mode) and stat.S_IMODE(mode) == 0o600


def test_a_sender_without_an_engine_drops_and_later_connects(path: Path, sender: AcknowledgementSender) -> None:
    sender.send([1])
    receiver = AcknowledgementReceiver(path)
    sender.send([2])
    assert receiver.drain() == [2]
    receiver.close()
    assert not path.exists()
    sender.send([3])  # the engine has ended
    assert not path.exists()


def test_a_restarted_engine_gets_the_old_sender_s_messages(path: Path, sender: AcknowledgementSender) -> None:
    before = open_files()
    for number in range(5):
        receiver = AcknowledgementReceiver(path)
        sender.send([number])
        assert receiver.drain() == [number]
        receiver.close()
    sender.close()
    assert open_files() == before, "no end of an old pipe is left open"


def test_an_engine_that_was_killed_leaves_a_pipe_that_the_next_one_replaces(
    path: Path, sender: AcknowledgementSender
) -> None:
    killed = AcknowledgementReceiver(path)
    sender.send([1])
    os.close(killed._fd)  # as the kernel does; the file stays
    assert path.exists()
    sender.send([2])  # nobody reads: dropped, without an error
    receiver = AcknowledgementReceiver(path)
    sender.send([3])
    assert receiver.drain() == [3]
    receiver.close()


def test_a_pipe_that_nobody_reads_never_blocks(
    receiver: AcknowledgementReceiver, sender: AcknowledgementSender
) -> None:
    start = time.monotonic()
    for number in range(3 * PIPE_BYTES // 8 // 64):
        sender.send([number] * 64)
    assert time.monotonic() - start < 10
    received: list[int] = []
    while ids := receiver.drain():
        received += ids
    assert 0 < len(received) <= PIPE_BYTES // 8
    assert received == sorted(received), "the first ones are kept, the rest is dropped"
    assert all(received.count(number) == 64 for number in set(received))
    sender.send([99])
    assert receiver.drain() == [99], "it goes on once there is room"


def test_a_file_that_is_no_pipe_is_left_alone(path: Path, sender: AcknowledgementSender) -> None:
    path.write_text("mine")
    before = open_files()
    sender.send([1])
    assert path.read_text() == "mine"
    assert open_files() == before


def test_a_new_engine_takes_the_place_of_whatever_lies_there(path: Path, sender: AcknowledgementSender) -> None:
    path.write_text("left over")
    receiver = AcknowledgementReceiver(path)
    sender.send([1])
    assert receiver.drain() == [1]
    receiver.close()


def test_closing_twice_is_harmless_for_a_sender(
    receiver: AcknowledgementReceiver, sender: AcknowledgementSender
) -> None:
    sender.send([1])
    sender.close()
    sender.close()
    sender.send([2])
    assert receiver.drain() == [1, 2]


def test_paths_differ_by_model_version_and_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    paths = {
        pipe_path("a", 1, 100), pipe_path("b", 1, 100), pipe_path("a", 2, 100), pipe_path("a", 1, 101),
        pipe_path("a/../../x", 1, 100),
    }  # fmt: skip
    assert len(paths) == 5
    (directory,) = {path.parent for path in paths}
    assert directory.parent == tmp_path and stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert pipe_path("a", "1") == pipe_path("a", 1, os.getppid())


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    directory = pipe_path("a", 1, 100).parent
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    directory.rename(tmp_path / "deepseek-triton-12345")
    with pytest.raises(PermissionError, match="belongs to another user"):
        pipe_path("a", 1, 100)


def test_the_detokenizers_life_is_counted(receiver: AcknowledgementReceiver, path: Path) -> None:
    """While its process is stopped, no time passes for it."""
    began = time.monotonic()
    assert receiver.life_since(began) == math.inf, "nobody has written anything"
    code = f"import time; from pathlib import Path; from {AcknowledgementSender.__module__} import *\n"
    code += f"sender = AcknowledgementSender(Path({str(path)!r})); input(); sender.close()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        try:
            until(lambda: 3 * BEAT_S <= receiver.life_since(began) < math.inf)
            process.send_signal(signal.SIGSTOP)
            time.sleep(3 * BEAT_S)  # a beat that was under way is over
            stopped = time.monotonic()
            life = receiver.life_since(began)
            time.sleep(3 * BEAT_S)
            assert receiver.life_since(stopped) == 0 and receiver.life_since(began) == life <= stopped - began
            process.send_signal(signal.SIGCONT)
            until(lambda: receiver.life_since(stopped) >= 2 * BEAT_S)
            assert stopped + 2 * BEAT_S <= time.monotonic()
        finally:
            process.send_signal(signal.SIGCONT)
            process.communicate(b"\n", 30)
    assert receiver.life_since(stopped) == math.inf, "the file is gone"


def test_a_life_that_is_longer_than_what_is_kept(receiver: AcknowledgementReceiver, path: Path) -> None:
    path.with_name("pipe-beats").write_bytes(np.arange(1.0, NUM_BEATS + 1).tobytes())
    assert receiver.life_since(NUM_BEATS - 3) == pytest.approx(3 * BEAT_S)
    assert receiver.life_since(1.0) == pytest.approx((NUM_BEATS - 1) * BEAT_S)
    assert receiver.life_since(0.5) == math.inf
