"""`deepseek-triton tune`, its measurements or its clients replaced."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.commands import tune_load
from deepseek_triton.builders.commands import tuning as command
from deepseek_triton.builders.commands.tune_load import TuneLoad, measure, read_texts, run
from deepseek_triton.builders.commands.tuning import tune
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions
from deepseek_triton.builders.tune import fingerprint as tuned_fingerprint
from deepseek_triton.builders.tune.measurement import Measurement
from deepseek_triton.builders.tune.options import TuneError, TuneOptions
from deepseek_triton.builders.tune.repository import put_configs, read_configs
from deepseek_triton.builders.tune.space import read_point, space_of, with_point
from deepseek_triton.clients.errors import RequestRejected
from tests.support.tuning import found, tiny_checkpoint, tiny_repository

LIMIT_MS = 100.0


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def repository(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / built.name


@pytest.fixture
def measured_points(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Points as they are measured; the fastest has a batch of 16 and 2 tokenizers."""
    points: list[dict[str, int]] = []

    def fake(repository: Path, name: str, configs: Any, load: TuneLoad) -> Measurement:
        point = read_point(space_of(configs, name, {}), configs, name)
        points.append(point)
        return found(50 - abs(point["max_batch_size"] - 16) + 5 * point["tokenizer_instances"], 40)

    monkeypatch.setattr(command, "measure", fake)
    return points


def options(repository: Path, **changes: Any) -> TuneOptions:
    values: dict[str, Any] = {
        "name": "s",
        "repository": repository,
        "p99_ms": LIMIT_MS,
        "output": repository.parent / "out",
    }
    return TuneOptions(**{**values, **changes})


def in_the_repository(repository: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in repository.rglob("*.pbtxt")}


@pytest.mark.slow
def test_tune_writes_the_winner_and_what_it_saw(repository: Path, measured_points: list[dict[str, int]]) -> None:
    told: list[str] = []
    tuned = tune(options(repository), tell=told.append)
    assert tuned.decision is not None and tuned.decision.winner is not None and tuned.is_complete and tuned.is_held
    winner = tuned.decision.winner.point
    assert (winner["max_batch_size"], winner["tokenizer_instances"]) == (16, 2)
    configs = read_configs(repository, "s")
    assert (configs["s-engine"].max_batch_size, configs["s-tokenizer"].instance_group[0].count) == (16, 2)
    out = repository.parent / "out"
    assert {path.name for path in out.iterdir()} == {"journal.jsonl", "table.txt", "throughput.png"}
    assert (out / "table.txt").read_text() == tuned.table
    search, decision = tuned.table.split("\n\n")
    assert len(search.splitlines()) == 1 + len(tuned.measured) and len(decision.splitlines()) == 2 + 3
    assert len(measured_points) == len(tuned.measured) + 8 * 3
    assert measured_points[-6:-3] == measured_points[-3:][::-1], "there and back"
    assert told[0].splitlines() == [
        "searching max_batch_size, max_queue_delay_us, tokenizer_instances, scorer_instances: 12 s a point and a "
        "server's start",
        "then confirming: 8 rounds of the start and at most 2 candidates, 24 measurements x 12 s = 288 s and as many "
        "starts",
        "in all at most 900 s",
    ]
    assert "confirming: 8 rounds of the start and 2 candidates; 24 measurements to do x 12 s = 288 s" in told


@pytest.mark.slow
def test_the_winner_becomes_the_start_and_keeps_its_place(
    repository: Path, measured_points: list[dict[str, int]]
) -> None:
    """The same command again uses the recorded rounds, whichever configuration was the initial one."""
    first = tune(options(repository))
    kept, count = in_the_repository(repository), len(measured_points)
    again = tune(options(repository))
    assert first.decision is not None and first.decision.winner is not None
    assert again.start == first.decision.winner.point
    assert again.decision is not None and again.decision.winner is None and again.is_held
    assert command.conclusion(again) == "nothing is better than the start beyond the noise: the configuration stays"
    assert in_the_repository(repository) == kept
    # A batch size is written with preferred sizes that depend on what was there before: those points are new.
    assert len(measured_points) - count < count


@pytest.mark.slow
def test_a_lucky_search_changes_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All configurations are equally fast; only the first measurement of one is lucky."""
    seen: dict[str, int] = {}

    def lucky(repository: Path, name: str, configs: Any, load: TuneLoad) -> Measurement:
        digest = tuned_fingerprint.configs_digest(configs)
        seen[digest] = seen.get(digest, -1) + 1
        return found(50 + (20 if seen[digest] == 0 and len(seen) == 4 else seen[digest] % 3), 40)

    monkeypatch.setattr(command, "measure", lucky)
    before = in_the_repository(repository)
    tuned = tune(options(repository))
    assert max(one.result.throughput for one in tuned.measured) == 70
    assert tuned.decision is not None and tuned.decision.winner is None and tuned.is_held
    assert in_the_repository(repository) == before and tuned.changed == []


@pytest.mark.slow
def test_what_breaks_the_limit_when_repeated_does_not_win(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}

    def measure(repository: Path, name: str, configs: Any, load: TuneLoad) -> Measurement:
        point = read_point(space_of(configs, name, {}), configs, name)
        digest = tuned_fingerprint.configs_digest(configs)
        counts[digest] = counts.get(digest, 0) + 1
        is_fast = point["max_batch_size"] == 16
        return found(90 if is_fast else 50, 150 if is_fast and counts[digest] > 1 else 40)

    monkeypatch.setattr(command, "measure", measure)
    before = in_the_repository(repository)
    tuned = tune(options(repository))
    assert tuned.decision is not None and "over the limit" in tuned.decision.verdicts[1]
    assert tuned.decision.winner is None and in_the_repository(repository) == before


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [3, "confirming"])
def test_a_run_that_was_killed_goes_on_where_it_was(
    killed_at: int | str, repository: Path, measured_points: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(options(repository, is_dry=True, output=repository.parent / "whole"))
    num_measured, num_search = len(measured_points), len(whole.measured)
    measured_points.clear()
    limit = num_search + 3 * 2 + 1 if killed_at == "confirming" else int(killed_at)
    real: Any = vars(command)["measure"]

    def killed(*arguments: Any) -> Measurement:
        if len(measured_points) == limit:
            raise KeyboardInterrupt
        result: Measurement = real(*arguments)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(command, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(options(repository))
    assert len(measured_points) == limit
    told: list[str] = []
    resumed = tune(options(repository), tell=told.append)
    assert resumed.decision == whole.decision
    # A round is measured whole: the one measurement of the third that was there can't be paired any more.
    assert len(measured_points) == num_measured + (1 if killed_at == "confirming" else 0)
    assert any("points were in" in line for line in told)


@pytest.mark.slow
def test_the_budget_bounds_the_search_and_keeps_room_for_the_rounds(
    repository: Path, measured_points: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TuneError, match=r"budget_s is 200; 24 confirming measurements of 12 s alone need 288 s: raise"):
        tune(options(repository, budget_s=200))
    assert measured_points == []
    now = 0.0

    def slow(*arguments: Any) -> Measurement:
        nonlocal now
        now += 20.0
        result: Measurement = real(*arguments)
        return result

    real: Any = vars(command)["measure"]
    monkeypatch.setattr(command, "measure", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    told: list[str] = []
    tuned = tune(options(repository, budget_s=580.0), tell=told.append)
    assert len(tuned.measured) == 5 and now == 580.0, "5 points and 24 confirming measurements of 20 s"
    assert not tuned.is_complete and tuned.decision is not None
    assert "no time for another point: the rest of the budget is kept for 24 confirming measurements x 20 s" in told


@pytest.mark.slow
def test_rounds_without_time_decide_nothing(
    repository: Path, measured_points: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def slower(*arguments: Any) -> Measurement:
        nonlocal now
        now += 12.0 if len(measured_points) < 20 else 40.0
        result: Measurement = real(*arguments)
        return result

    real: Any = vars(command)["measure"]
    monkeypatch.setattr(command, "measure", slower)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    before = in_the_repository(repository)
    tuned = tune(options(repository, budget_s=600.0))
    assert tuned.decision is None and not tuned.is_complete and now <= 640.0
    assert in_the_repository(repository) == before
    assert command.conclusion(tuned) == "nothing chosen yet"
    assert tune(options(repository, budget_s=3000.0)).decision is not None


def test_a_start_that_cannot_be_measured_ends_at_once(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail(*_: Any) -> Measurement:
        calls.append(1)
        return found(0, failure="no labels in the request")

    monkeypatch.setattr(command, "measure", fail)
    with pytest.raises(TuneError, match=r"^s as it is can't be measured: no labels in the request$"):
        tune(options(repository))
    assert len(calls) == 1


# A journal after something has changed


def rerun_error(repository: Path, **changes: Any) -> str:
    with pytest.raises(TuneError) as caught:
        tune(options(repository, is_dry=True, **changes))
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": 4}, "clients is 16 there and 4 now"),
        ({"seconds": 5.0}, "seconds is 10.0 there and 5.0 now"),
        ({"labels": ("x", "y")}, r"labels is \[\] there and \['x', 'y'\] now"),
    ],
)
def test_a_journal_of_another_load_is_refused(
    changes: dict[str, Any], message: str, repository: Path, measured_points: list[dict[str, int]]
) -> None:
    tune(options(repository, is_dry=True))
    assert re.search(f"journal.jsonl is of another run: {message}; remove it, or", rerun_error(repository, **changes))


@pytest.mark.slow
def test_a_journal_of_another_build_machine_or_code_is_refused(
    repository: Path,
    measured_points: list[dict[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "texts").write_text("one\ntwo\n")
    tune(options(repository, is_dry=True, texts=tmp_path / "texts"))
    count = len(measured_points)
    assert tune(options(repository, is_dry=True, texts=tmp_path / "texts")).decision is not None
    assert len(measured_points) == count, "nothing has changed: nothing is measured"
    (tmp_path / "texts").write_text("one\nthree\n")
    assert "texts is" in rerun_error(repository, texts=tmp_path / "texts")
    (tmp_path / "texts").write_text("one\ntwo\n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_getaffinity", lambda _: {0})
        assert "machine is {" in rerun_error(repository, texts=tmp_path / "texts")
    with monkeypatch.context() as patched:
        shutil.copytree(tuned_fingerprint.CODE / "scoring", tmp_path / "code")
        patched.setattr(tuned_fingerprint, "CODE", tmp_path / "code")
        assert "code is" in rerun_error(repository, texts=tmp_path / "texts")
    assert tune(options(repository, is_dry=True, texts=tmp_path / "texts")).is_complete
    scoring = ScoringOptions(labels=("a", "b"), batching=Batching(max_batch_size=8, preferred_batch_sizes=(4,)))
    build(BuildOptions(tiny_checkpoint(tmp_path), "s", repository, task="score", max_seq_len=24, scoring=scoring))
    assert "build is" in rerun_error(repository, texts=tmp_path / "texts")
    assert len(measured_points) == count


def test_every_artefact_counts_as_the_build(repository: Path) -> None:
    configs = read_configs(repository, "s")
    before = tuned_fingerprint.build_digest(repository, configs)
    for path in sorted((repository).glob("s*/1/*")):
        data = path.read_bytes()
        path.write_bytes(data + b" ")
        assert tuned_fingerprint.build_digest(repository, configs) != before, path
        path.write_bytes(data)
    assert tuned_fingerprint.build_digest(repository, configs) == before


@pytest.mark.slow
def test_another_limit_measures_nothing_again_and_decides_anew(
    repository: Path, measured_points: list[dict[str, int]]
) -> None:
    """A measurement doesn't depend on the limit; which points are searched, and what wins, does."""
    first = tune(options(repository, is_dry=True))
    count = len(measured_points)
    other = tune(options(repository, is_dry=True, p99_ms=39.0))
    assert other.decision is None or other.decision.winner is None
    assert not other.is_held and first.is_held
    assert all(point not in [one.point for one in first.measured] for point in measured_points[count:][:-24])


@pytest.mark.slow
def test_a_configuration_that_was_changed_by_hand_is_measured_anew(
    repository: Path, measured_points: list[dict[str, int]]
) -> None:
    """The queue policy isn't tuned; the same point with another one is another configuration."""
    first = tune(options(repository, is_dry=True))
    configs = read_configs(repository, "s")
    configs["s-engine"].dynamic_batching.default_queue_policy.max_queue_size = 7
    put_configs(repository, configs)
    measured_points.clear()
    again = tune(options(repository, is_dry=True))
    assert len(measured_points) == len(again.measured) + 24
    assert [one.point for one in again.measured] == [one.point for one in first.measured]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p99_ms": 0.0}, "p99_ms is 0.0, must be finite and above 0"),
        ({"budget_s": float("nan")}, "budget_s is nan"),
        ({"clients": 0}, "clients is 0, must be at least 1"),
        ({"rounds": 4}, "rounds is 4, must be at least 5"),
    ],
)
def test_options_at_fault(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TuneError, match=message):
        options(tmp_path, **change)


def test_texts_are_lines_as_they_are(tmp_path: Path) -> None:
    long = "word " * 200
    (tmp_path / "t").write_text(f"a\n\n  b \n{long}\n")
    assert read_texts(tmp_path / "t") == ["a", "b", long.strip()]
    (tmp_path / "t").write_text("\n")
    for path, message in ((tmp_path / "t", "holds no text"), (tmp_path / "no", "can't be read")):
        with pytest.raises(TuneError, match=message):
            read_texts(path)


def test_built_in_texts_begin_differently_so_that_no_prefix_is_reused() -> None:
    texts = read_texts(None)
    assert len(texts) > 600
    assert len({" ".join(text.split()[:6]) for text in texts}) == len(texts)
    assert {len(text.split()) for text in texts} == {40}


@pytest.mark.slow
def test_the_command_tells_what_it_found(
    repository: Path, measured_points: list[dict[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "s", "--repository", str(repository), "--output", str(repository.parent / "out")]
    assert cli.main([*arguments, "--p99-ms", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "error: nothing holds 1 ms for sure; raise --p99-ms, or lower --clients"
    assert "nothing chosen, the configuration stays; see" in captured.out
    assert cli.main([*arguments, "--p99-ms", "100"]) == 0
    captured = capsys.readouterr()
    assert "max_batch_size" in captured.out and f"wrote {repository / 's-engine' / 'config.pbtxt'}" in captured.out
    assert captured.out.splitlines()[-1].startswith("start the server again; see")
    assert "confirming: 8 rounds" in captured.err and "round 8 of 8: max_batch_size" in captured.err


def test_what_is_wrong_is_told_in_one_line_before_anything_starts(
    repository: Path, measured_points: list[dict[str, int]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--repository", str(repository), "--p99-ms", "100"]
    for more, message in (
        (["s", "--clients", "0"], "clients is 0, must be at least 1"),
        (["s", "--p99-ms", "0"], "p99_ms is 0.0, must be finite and above 0"),
        (["no", *arguments], "has no model 'no'; there are g, s"),
        (
            ["s", "--repository", str(tmp_path / "none")],
            "is not a directory; build a model first, or name another repository",
        ),
        (["s-engine"], "s-engine is a part of s: name s"),
        (["s", "--texts", str(tmp_path / "none")], "can't be read"),
        (["g", "--labels", "a,b"], "labels are for scoring models, g generates"),
        (["s", "--budget-s", "30"], "budget_s is 30; 24 confirming measurements"),
        (["s", "--output", "/dev/null/x"], "Not a directory; choose another --output"),
    ):
        assert cli.main(["tune", *more[:1], *arguments, *more[1:]]) == 1
        error = capsys.readouterr().err
        assert message in error and error.splitlines()[-1].startswith("error: "), error
        assert "Traceback" not in error
    assert measured_points == []


@pytest.mark.slow
def test_a_repository_that_cannot_be_written_to_is_told_before_anything_is_measured(
    repository: Path, measured_points: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # To the superuser a directory's mode says nothing, so what it would say is put in.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "s-engine")
    with pytest.raises(TuneError, match=r"s-engine can't be written to, so a winner couldn't be: --dry-run only"):
        tune(options(repository))
    assert measured_points == []
    assert tune(options(repository, is_dry=True)).decision is not None


def test_an_interrupt_tells_how_to_go_on(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Measurement:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    out = str(repository.parent / "out")
    assert cli.main(["tune", "s", "--repository", str(repository), "--p99-ms", "9", "--output", out]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted: the same command goes on from the journal"


# TuneLoad


class FakeClient:
    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None: ...


def a_load(ask: Any, clients: int, seconds: float) -> TuneLoad:
    return TuneLoad(["a"], clients, seconds, ask)


@pytest.mark.slow
def test_load_counts_what_is_answered_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_load, "GrpcClient", FakeClient)
    result = run(a_load(lambda client, text: time.sleep(0.01), 4, 0.5), "x:1", "m")
    assert not result.failure and 20 < len(result.latencies_ms) <= 220
    assert result.throughput == len(result.latencies_ms) / 0.5
    assert 10 <= result.p50_ms <= result.p99_ms < 500
    assert Measurement.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_load_with_one_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_load, "GrpcClient", FakeClient)

    def ask(client: Any, text: str) -> None:
        raise RequestRejected("queue\nis full")

    assert run(a_load(ask, 2, 5), "x:1", "m").failure == "queue is full"
    assert "no request was answered" in run(a_load(lambda c, t: time.sleep(0.2), 1, 0.1), "x:1", "m").failure


def test_an_interrupt_does_not_wait_for_the_seconds_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []

    class Closable(FakeClient):
        def __exit__(self, *_: object) -> None:
            closed.append(1)

    class Interrupted(ThreadPoolExecutor):
        def map(self, *arguments: Any, **options: Any) -> Any:
            super().map(*arguments, **options)
            raise KeyboardInterrupt

    monkeypatch.setattr(tune_load, "GrpcClient", Closable)
    monkeypatch.setattr(tune_load, "ThreadPoolExecutor", Interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(a_load(lambda client, text: time.sleep(0.01), 3, 60), "x:1", "m")
    assert time.monotonic() - began < 30 and len(closed) == 3


def test_a_point_that_cannot_be_served_is_a_result(repository: Path) -> None:
    configs = read_configs(repository, "g")
    space = space_of(configs, "g", {})
    bad = with_point(space, configs, "g", {**read_point(space, configs, "g"), "max_num_batched_tokens": 256})
    result = measure(repository, "g", bad, a_load(None, 1, 1))
    assert "max_num_batched_tokens is 256" in result.failure and "\n" not in result.failure


def test_a_full_disk_is_no_result_but_an_error(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "temporary")

    configs = read_configs(repository, "g")
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(TuneError, match="temporary: No space left on device; set TMPDIR to another disk"):
        measure(repository, "g", configs, a_load(None, 1, 1))
