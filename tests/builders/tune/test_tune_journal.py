"""The journal: reading it back, refusing others, and surviving a killed run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.tune.journal import Journal
from deepseek_triton.builders.tune.measurement import Measured, Measurement
from deepseek_triton.builders.tune.options import TuneError
from tests.support.tuning import found

FINGERPRINT = {"model": "m", "build": "b1"}


def measured(throughput: float) -> Measured:
    return Measured({"batch": 2}, found(throughput))


def test_it_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "out" / "journal.jsonl"
    with Journal(path, FINGERPRINT) as journal:
        journal.add("c1", measured(12.5))
        journal.add_round(0, {"c1": found(3), "c2": found(4, 20.5)})
        assert journal.get("c1") == found(12.5)
    with Journal(path, FINGERPRINT) as again:
        assert again.get("c1") == found(12.5) and again.get("c2") is None
        assert again.get_round(0, ["c2", "c1"]) == [found(4, 20.5), found(3)], "in the order that was asked for"
        assert again.get_round(1, ["c1", "c2"]) is None
        assert again.get_round(0, ["c1"]) is None and again.get_round(0, ["c1", "c3"]) is None, "another comparison"


def test_failures_may_pass_and_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, FINGERPRINT) as journal:
        journal.add("c1", Measured({"batch": 2}, found(0, failure="no memory")))
        journal.add_round(0, {"c1": found(3), "c2": found(0, failure="no memory")})
        assert journal.get("c1") is None and journal.get_round(0, ["c1", "c2"]) is None
    assert path.read_text().count("\n") == 1


@pytest.mark.parametrize("cut", [1, 9, 60])
def test_a_write_that_was_cut_short_costs_one_entry(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, FINGERPRINT) as journal:
        journal.add("c1", measured(1))
        journal.add("c2", measured(2))
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, FINGERPRINT) as again:
        assert again.get("c1") == found(1) and again.get("c2") is None
        again.add("c2", measured(3))
    with Journal(path, FINGERPRINT) as third:
        assert third.get("c1") == found(1) and third.get("c2") == found(3)


def test_a_header_that_was_cut_short_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"format": 2, "mod')
    with Journal(path, FINGERPRINT) as journal:
        journal.add("c1", measured(1))
    with Journal(path, FINGERPRINT) as again:
        assert again.get("c1") == found(1)


def test_a_damaged_journal_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, FINGERPRINT) as journal:
        journal.add("c1", measured(1))
        journal.add_round(0, {"c1": found(3)})
    whole = path.read_text()
    for text, message in (
        (whole.replace('"configs"', '"confi'), r"journal.jsonl:2 is damaged; remove that line"),
        (whole.replace('"latencies_ms": [5.0', '"latencies_ms": ["x"'), r":2 is damaged"),
        (whole.replace('"round": 0', '"round": null'), r":3 is damaged"),
        (whole.replace('"seconds": 10.0', '"seconds": 0.0'), r":2 is damaged"),
        ("nonsense\n", r":1 is no journal's first line"),
        ("\x00\xff\n", r":1 is no journal's first line"),
        (whole.replace('"model": "m"', '"model": "n"'), "is of another run: model is 'n' there and 'm' now"),
        (whole.replace('"format": 2', '"format": 1'), "is of another run: format is 1 there and 2 now"),
    ):
        path.write_text(text)
        with pytest.raises(TuneError, match=message):
            Journal(path, FINGERPRINT)
        assert path.read_text() == text, "it is left to be looked at"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(TuneError, match="can't be read"):
        Journal(path, FINGERPRINT)


def test_two_runs_do_not_share_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, FINGERPRINT), pytest.raises(TuneError, match="is in use by another run; wait for its end, or"):
        Journal(path, FINGERPRINT)
    with Journal(path, FINGERPRINT) as journal:
        assert journal.get("c1") is None


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, FINGERPRINT) as journal:
        journal.add("c1", measured(1))

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(TuneError, match=r"journal.jsonl: No space left on device; make room"):
                journal.add("c2", measured(2))
    with Journal(path, FINGERPRINT) as again:
        assert again.get("c1") == found(1)


@pytest.mark.parametrize(("make", "message"), [(Path.mkdir, "Is a directory"), (Path.touch, None)])
def test_where_it_cannot_be_is_told(tmp_path: Path, make: Any, message: str | None) -> None:
    path = tmp_path / "journal.jsonl"
    make(path)
    if message is None:
        with Journal(path, FINGERPRINT):
            return  # an empty file is a run that was killed at once
    with pytest.raises(TuneError, match=f"{message}; choose another --output"):
        Journal(path, FINGERPRINT)


WRITER = """
import sys
from pathlib import Path
from deepseek_triton.builders.tune.journal import Journal
from deepseek_triton.builders.tune.measurement import Measured
from tests.support.tuning import found

with Journal(Path(sys.argv[1]), {"model": "m", "build": "b1"}) as journal:
    begin = sum(journal.get(f"c{i}") is not None for i in range(100_000))
    print(begin, flush=True)
    for i in range(begin, 100_000):
        journal.add(f"c{i}", Measured({"batch": i}, found(1 + i % 7)))
"""


@pytest.mark.slow
def test_killed_again_and_again_while_it_writes_it_loses_nothing_that_was_whole(tmp_path: Path) -> None:
    path, root, begins = tmp_path / "journal.jsonl", Path(__file__).parents[3], []
    for _ in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=root, text=True
        ) as writer:
            assert writer.stdout is not None
            begins.append(int(writer.stdout.readline()))
            size = path.stat().st_size
            while path.stat().st_size < size + 20_000:
                assert writer.poll() is None, "it ended before it could be killed"
            writer.send_signal(signal.SIGKILL)
    with Journal(path, FINGERPRINT) as journal:
        count = sum(journal.get(f"c{i}") is not None for i in range(100_000))
        assert all(journal.get(f"c{i}") == found(1 + i % 7) for i in range(count))
    assert begins[0] == 0 and begins == sorted(set(begins)) and count > begins[-1]
    assert count + 1 == path.read_bytes().count(b"\n"), "no entry twice, none torn"


def test_a_measurement_says_what_it_measured() -> None:
    result = Measurement((30.0, 10.0, 20.0, 40.0), 2.0)
    assert (result.throughput, result.p50_ms, result.p99_ms) == (2.0, 20.0, 40.0)
    assert Measurement.from_dict(result.to_dict()) == result
    nothing = Measurement(failure="x")
    assert (nothing.throughput, nothing.p99_ms) == (0.0, 0.0) and Measurement.from_dict(nothing.to_dict()) == nothing
    with pytest.raises(ValueError, match="or a failure"):
        Measurement.from_dict({"latencies_ms": [], "seconds": 1.0, "failure": ""})
