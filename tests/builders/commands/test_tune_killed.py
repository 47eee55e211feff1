"""`deepseek-triton tune` as a user starts it, on a real server, killed by SIGKILL in the middle and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from tests.serving.test_server import needs_server
from tests.support.tuning import tiny_checkpoint

ROUNDS = 5
ROOT = Path(__file__).parents[3]
# The command with one parameter to tune, of two values: each point and each measurement of a round takes a server.
# Clients that pause leave the processor to what they are beside; a second is long enough for an answer all the same.
TUNE = """
import sys, time
from deepseek_triton.builders.commands import tuning
from deepseek_triton.builders.tune import space
asker = tuning.asker
def patient(*options):
    ask = asker(*options)
    def ask_after_a_pause(client, text):
        time.sleep(0.1)
        return ask(client, text)
    return ask_after_a_pause
tuning.asker = patient
space.GENERATING = tuple(one for one in space.GENERATING if one.name == "max_num_batched_tokens")
from deepseek_triton.builders.cli import main
sys.exit(main())
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    checkpoint = tiny_checkpoint(tmp_path)
    # The length allows 16 and 32 tokens in a step.
    settings = {"max_num_seqs": 32, "max_num_batched_tokens": 32}
    build(BuildOptions(checkpoint, "g", tmp_path / "models", max_seq_len=32, settings=settings))
    return tmp_path / "models"


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where the command's temporary files go, so that the test sees what is left."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    return directory


def arguments(repository: Path) -> list[str]:
    texts = repository.parent / "texts"
    texts.write_text("".join(f"{number} is a number\n" for number in range(50)))
    return [
        sys.executable, "-c", TUNE, "tune", "g", "--repository", str(repository),
        "--p99-ms", "5000",
        "--seconds", "1", "--rounds", str(ROUNDS), "--clients", "2", "--max-tokens", "4", "--texts", str(texts),
        "--budget-s", "900", "--output", str(repository.parent / "out"),
    ]  # fmt: skip


@contextlib.contextmanager
def started(repository: Path, temporary: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with (repository.parent / "stderr").open("a") as stderr:
        process = subprocess.Popen(
            arguments(repository),
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=ROOT,
            env=environment,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def servers(temporary: Path) -> list[int]:
    """The processes that serve a copy in `temporary`: tritonserver, its guard, its stubs. A zombie serves nothing."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{temporary}/deepseek-triton-tune-" in path.read_text(errors="replace"):
                found.append(int(path.parent.name))
    return found


def own_directories(temporary: Path) -> list[str]:
    """Those of tune and of the servers that it starts; where models meet is the user's, and stays."""
    names = (path.name for path in temporary.iterdir())
    return [name for name in names if name.startswith(("deepseek-triton-tune-", "tritonserver-"))]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None, limit_s: float = 240.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process is None or process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def configurations(repository: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in repository.glob("*/config.pbtxt")}


def whole_entries(repository: Path) -> list[dict[str, Any]]:
    """What the journal holds but its first line, and but for a last line that was cut short."""
    path = repository.parent / "out" / "journal.jsonl"
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()[1:]]


def kill_while_it_measures(process: subprocess.Popen[str], repository: Path, temporary: Path) -> list[dict[str, Any]]:
    """SIGKILL to the whole process group, while a server of its own runs; gives what the journal holds then."""
    before = configurations(repository)
    wait_for(lambda: len(servers(temporary)) > 2, process)  # tritonserver, its guard and a stub at least
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    entries = whole_entries(repository)
    wait_for(lambda: servers(temporary) == [], None, limit_s=25.0)
    assert configurations(repository) == before and check_repository(repository) == []
    return entries


@pytest.mark.server
@needs_server
def test_killed_twice_it_measures_nothing_twice_and_leaves_nothing_behind(repository: Path, temporary: Path) -> None:
    before = configurations(repository)

    with started(repository, temporary) as process:
        wait_for(lambda: whole_entries(repository), process)
        first = kill_while_it_measures(process, repository, temporary)
    assert not any("round" in entry for entry in first), "killed while it searched"
    assert len(own_directories(temporary)) == 2, "the copy and the server's, which nobody could remove"

    with started(repository, temporary) as process:
        wait_for(lambda: sum("round" in entry for entry in whole_entries(repository)) >= 2, process)
        second = kill_while_it_measures(process, repository, temporary)
    assert second[: len(first)] == first

    with started(repository, temporary) as process:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, (repository.parent / "stderr").read_text()
    entries = whole_entries(repository)
    assert entries[: len(second)] == second
    points = Counter(entry["configs"] for entry in entries if "configs" in entry)
    assert set(points.values()) == {1}, "no point was measured twice"
    num_points = sum("configs" in entry for entry in second)
    assert f"{num_points} of {num_points} points were in" in (repository.parent / "stderr").read_text()
    rounds = Counter((entry["round"], *sorted(entry["results"])) for entry in entries if "round" in entry)
    assert set(rounds.values()) == {1} and len(rounds) == ROUNDS, "no round was measured twice"

    after = configurations(repository)
    changed = {name for name in before if before[name] != after[name]}
    assert {f"wrote {repository / name / 'config.pbtxt'}" for name in changed} == {
        line for line in out.splitlines() if line.startswith("wrote ")
    }
    assert check_repository(repository) == []
    assert servers(temporary) == [] and own_directories(temporary) == [], "what the killed runs left has been removed"
    assert not list(repository.glob(".*"))


@pytest.mark.server
@needs_server
def test_terminated_it_stops_its_server_before_it_ends(repository: Path, temporary: Path) -> None:
    with started(repository, temporary) as process:
        wait_for(lambda: len(servers(temporary)) > 1, process)
        process.terminate()
        assert process.wait(30) == 130
        assert servers(temporary) == [] and own_directories(temporary) == []
    assert "interrupted: the same command goes on from the journal" in (repository.parent / "stderr").read_text()
