"""The files of a collection: kills, bounds, days, deletion."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.gateway.collection.files import CollectionFiles, LineTooLongError
from deepseek_triton.gateway.collection.lines import AnswerId
from deepseek_triton.gateway.collection.pseudonyms import ANONYMOUS, Pseudonyms
from tests.support.gateway_process import ROOT

WRITER = """
import sys
from pathlib import Path
from deepseek_triton.gateway.collection.files import CollectionFiles
files = CollectionFiles(Path(sys.argv[1]))
for number in range(10**9):
    files.append("answers", {"id": f"{sys.argv[2]}-{number}", "choice": 0, "owner": "o", "text": "x" * 50_000})
    print(number, flush=True)
"""
COMMAND = (sys.executable, "-c", WRITER)


def line(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "choice": 0, "owner": "o", "text": f"text {number}", **more}


def ids(files: CollectionFiles) -> list[str]:
    return [one["id"] for one in files.read("answers")]


@pytest.mark.slow
def test_a_kill_loses_no_line_that_was_written(tmp_path: Path) -> None:
    """Two writers are killed while they write; every line that they had reported is there, once and whole."""
    told: dict[str, int] = {}
    for turn in range(3):
        writers = {
            name: subprocess.Popen([*COMMAND, str(tmp_path), name], cwd=ROOT, stdout=subprocess.PIPE)
            for name in (f"a{turn}", f"b{turn}")
        }
        for writer in writers.values():
            assert writer.stdout is not None
            for _ in range(20):
                writer.stdout.readline()
        for name, writer in writers.items():
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.communicate()[0].split()
            told[name] = 20 + len(rest)
    files = CollectionFiles(tmp_path)
    found = ids(files)
    assert len(found) == len(set(found))
    for name, count in told.items():
        mine = [one for one in found if one.startswith(f"{name}-")]
        assert mine == [f"{name}-{number}" for number in range(len(mine))] and count <= len(mine) <= count + 1
    assert all(len(one["text"]) == 50_000 for one in files.read("answers"))


@pytest.mark.parametrize("torn", [b'{"id":"r9","choice":0', b"\xff" * 3_000_000, b'{"id":"r9","choice":0,"owner":"o"}'])
def test_a_torn_line_is_passed_over_and_then_removed(tmp_path: Path, torn: bytes) -> None:
    files = CollectionFiles(tmp_path)
    files.append("answers", line(1))
    [path] = tmp_path.glob("answers-*")
    with path.open("ab") as file:
        file.write(torn)
    if not torn.endswith(b"}"):
        assert ids(files) == ["r1"]
    files.append("answers", line(2))
    assert ids(files) == ["r1", "r2"] and path.read_bytes().count(b"\n") == 2


def test_the_oldest_file_goes_first(tmp_path: Path) -> None:
    files = CollectionFiles(tmp_path, max_bytes=16_000)  # files of 1,000 bytes
    for number in range(100):
        files.append("answers", line(number, text="x" * 400))
    assert files.num_bytes() <= 16_000 and len(list(tmp_path.glob("answers-*"))) > 10
    kept = ids(files)
    assert kept == [f"r{number}" for number in range(100 - len(kept), 100)] and len(kept) > 25
    with pytest.raises(LineTooLongError):
        files.append("answers", line(1, text="x" * 1000))


def test_no_line_is_kept_longer_than_its_days(tmp_path: Path) -> None:
    files = CollectionFiles(tmp_path, days=3)
    files.append("answers", line(1))
    files.append("feedback", line(1))
    (tmp_path / ".answers-2020-01-01-0001.jsonl.abc").touch()  # what a killed delete leaves
    today = datetime.now(timezone.utc).date()
    files.remove_old(today + timedelta(days=2))
    assert ids(files) == ["r1"] and not list(tmp_path.glob(".answers*"))
    files.remove_old(today + timedelta(days=3))
    assert not list(tmp_path.glob("*.jsonl"))


def test_an_answer_is_found_by_who_asked_for_it(tmp_path: Path) -> None:
    files = CollectionFiles(tmp_path)
    files.append("answers", line(1, text='\n{"id":"r2","choice":0,"owner":"o","text":""}'))
    for number in range(3, 40):
        files.append("answers", line(number, text="x" * 100_000))
    assert files.has(AnswerId("r1", 0, "o")) and files.has(AnswerId("r39", 0, "o"))
    for other in (AnswerId("r2", 0, "o"), AnswerId("r1", 1, "o"), AnswerId("r1", 0, "p"), AnswerId("r", 0, "o")):
        assert not files.has(other)


def test_lines_are_deleted_while_others_are_written(tmp_path: Path) -> None:
    files = CollectionFiles(tmp_path)
    for number in range(20):
        files.append("answers", line(number, owner="ab"[number % 2]))
    ended = threading.Event()

    def write() -> None:
        for number in range(20, 200):
            CollectionFiles(tmp_path).append("answers", line(number, owner="b"))
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not ended.is_set():
        files.delete("answers", lambda one: one["owner"] == "a")
    thread.join()
    assert set(ids(files)) == {f"r{number}" for number in range(200) if number >= 20 or number % 2}
    assert files.delete("answers", lambda one: True) and not list(tmp_path.glob("*.jsonl"))


def test_the_files_are_their_users_alone(tmp_path: Path) -> None:
    directory = tmp_path / "collected"
    files = CollectionFiles(directory)
    files.append("answers", line(1))
    names = Pseudonyms(directory)
    assert Pseudonyms(directory).owner("0123") == names.owner("0123") != Pseudonyms(tmp_path).owner("0123")
    assert names.owner("") == ANONYMOUS and names.user("") == "" and names.user("x") != names.owner("x")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (directory, *directory.glob("*"))}
    del modes["lock"]
    assert {name: mode & 0o077 for name, mode in modes.items() if mode & 0o077} == {}
