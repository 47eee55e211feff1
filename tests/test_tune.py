"""Tuning without a server: the space, the search, the journal, and how the winner gets into the repository."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builders import cli
from builders.check import CheckError, check_repository
from builders.commands import tune as command
from builders.commands.tune import TuneOptions, load, read_texts, tune
from builders.files import write_atomically
from builders.options import BuildOptions
from builders.repository import build
from builders.scoring_options import Batching, ScoringOptions
from builders.tune import repository as tuned_repository
from builders.tune.journal import Journal
from builders.tune.report import table
from builders.tune.repository import copied, put_configs, read_configs
from builders.tune.search import Axis, Measured, Measurement, best_of, is_better, search
from builders.tune.space import Point, TuneError, read_point, space_of, with_point
from clients.errors import RequestRejected
from tests.checkpoints import make_tokenizer, write_tiny

LIMIT_MS = 100.0


def found(throughput: float, p99_ms: float = 10.0, failure: str = "") -> Measurement:
    return Measurement(throughput, p99_ms / 2, p99_ms, 100, failure)


# Search


def test_more_throughput_is_better_within_the_limit_and_less_latency_without() -> None:
    assert is_better(found(20), found(10), LIMIT_MS) and not is_better(found(10), found(20), LIMIT_MS)
    assert not is_better(found(10.1), found(10), LIMIT_MS), "noise"
    assert not is_better(found(99, 101), found(10), LIMIT_MS) and is_better(found(10), found(99, 101), LIMIT_MS)
    assert is_better(found(1, 200), found(9, 300), LIMIT_MS), "on the way to the limit"
    assert is_better(found(1), found(0, failure="x"), LIMIT_MS) and not is_better(found(0, failure="x"), found(1), 1)


def hill(point: Point) -> Measurement:
    """Best at (8, 2000); too slow beyond 16 or 5000."""
    batch, delay = AXES[0].values.index(point["batch"]), AXES[1].values.index(point["delay"])
    return found(100 - 9 * abs(batch - 3) - 8 * abs(delay - 2), 60 * max(batch - 3, 0) + 60 * max(delay - 2, 0) + 30)


AXES = [Axis("batch", (1, 2, 4, 8, 16, 32)), Axis("delay", (0, 500, 2000, 5000, 20000))]


@pytest.mark.parametrize("start", [{"batch": 1, "delay": 0}, {"batch": 32, "delay": 20000}, {"batch": 8, "delay": 0}])
def test_the_search_finds_the_hill_with_fewer_points_than_the_product(start: Point) -> None:
    asked: list[Point] = []

    def measure(point: Point) -> Measurement:
        asked.append(point)
        return hill(point)

    measured = search(AXES, start, measure, LIMIT_MS)
    best = best_of(measured, LIMIT_MS)
    assert best is not None and best.point == {"batch": 8, "delay": 2000}
    assert len({tuple(point.items()) for point in asked}) == len(asked) == len(measured) < 20


def test_the_search_ends_with_what_it_has_when_time_is_up() -> None:
    left = iter(range(3))
    measured = search(AXES, {"batch": 1, "delay": 0}, lambda p: hill(p) if next(left, None) is not None else None, 100)
    assert len(measured) == 3
    assert search(AXES, {"batch": 1, "delay": 0}, lambda point: None, 100) == []


def test_nothing_within_the_limit_has_no_winner() -> None:
    measured = search(AXES, {"batch": 1, "delay": 0}, lambda point: found(5, 300), LIMIT_MS)
    assert best_of(measured, LIMIT_MS) is None
    assert table(measured, None, LIMIT_MS).splitlines()[1].startswith("-")


# Journal


def test_a_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "out" / "journal.jsonl"
    journal = Journal(path, {"model": "m"})
    journal.add(Measured({"batch": 2, "delay": 0}, found(12.5)))
    journal.add(Measured({"batch": 4, "delay": 0}, Measurement(failure="no server")))
    again = Journal(path, {"model": "m"})
    assert again.get({"delay": 0, "batch": 2}) == found(12.5)
    assert again.get({"delay": 0, "batch": 4}) == Measurement(failure="no server")
    assert again.get({"delay": 1, "batch": 4}) is None


def test_a_write_that_was_cut_short_costs_one_point(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"model": "m"})
    for batch in (1, 2):
        journal.add(Measured({"batch": batch}, found(batch)))
    path.write_text(path.read_text()[:-9])
    again = Journal(path, {"model": "m"})
    assert again.get({"batch": 1}) == found(1) and again.get({"batch": 2}) is None
    again.add(Measured({"batch": 2}, found(3)))
    assert Journal(path, {"model": "m"}).get({"batch": 2}) == found(3)


def test_a_damaged_journal_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, {"model": "m"}).add(Measured({"batch": 1}, found(1)))
    whole = path.read_text()
    for text, message in (
        (whole.replace('"point"', '"poin'), r"journal.jsonl:2 is damaged; remove that line"),
        (whole.replace('"batch": 1', '"batch": "x"'), r":2 is damaged"),
        (whole.replace('"throughput"', '"speed"'), r":2 is damaged"),
        ("nonsense\n", r":1 is no journal's first line"),
        (whole.replace('"model": "m"', '"model": "n"'), "is of another run: model is 'n' there and 'm' now"),
    ):
        path.write_text(text)
        with pytest.raises(TuneError, match=message):
            Journal(path, {"model": "m"})
        assert path.read_text() == text, "it is left to be looked at"


# The space, and a repository


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tokenizer(write_tiny(tmp_path / "tiny", vocab_size=320, eos_token_id=319))


@pytest.fixture
def repository(checkpoint: Path, tmp_path: Path) -> Path:
    models = tmp_path / "models"
    scoring = ScoringOptions(labels=("a", "b"), batching=Batching(max_batch_size=8, preferred_batch_sizes=(4,)))
    build(BuildOptions(checkpoint, "s", models, task="score", max_seq_len=32, scoring=scoring))
    settings = {"num_slots": 3, "prefill_chunk": 8}
    build(BuildOptions(checkpoint, "g", models, max_seq_len=32, settings=settings))
    return models


@pytest.mark.parametrize(
    ("name", "start", "point"),
    [
        (
            "s",
            {"max_batch_size": 8, "max_queue_delay_us": 2000, "tokenizer_instances": 1, "scorer_instances": 1},
            {"max_batch_size": 2, "max_queue_delay_us": 0, "tokenizer_instances": 2, "scorer_instances": 2},
        ),
        (
            "g",
            {"num_slots": 3, "prefill_chunk": 8, "tokenizer_instances": 1},
            {"num_slots": 16, "prefill_chunk": 32, "tokenizer_instances": 2},
        ),
    ],
)
def test_a_point_is_written_and_read_back(name: str, start: Point, point: Point, repository: Path) -> None:
    configs = read_configs(repository, name)
    space = space_of(configs, name, {"prefill_chunk": 32})
    assert read_point(space, configs, name) == start
    assert all(start[parameter.name] in parameter.values for parameter in space)
    assert max(next(p.values for p in space if p.name == "prefill_chunk") if name == "g" else (32,)) == 32
    changed = with_point(space, configs, name, point)
    assert read_point(space, changed, name) == point
    assert read_point(space, configs, name) == start, "the original stays"
    with copied(repository, changed) as copy:
        assert check_repository(copy) == []
        assert read_point(space, read_configs(copy, name), name) == point
    assert not copy.exists()
    paths = put_configs(repository, changed)
    assert read_point(space, read_configs(repository, name), name) == point
    assert all(path.name == "config.pbtxt" for path in paths) and check_repository(repository) == []
    assert put_configs(repository, changed) == [], "nothing to change"


def test_a_batch_size_keeps_what_goes_with_it(repository: Path) -> None:
    configs = read_configs(repository, "s")
    space = space_of(configs, "s", {})
    point = read_point(space, configs, "s")
    for size, preferred in ((2, [2]), (16, [4, 16])):
        changed = with_point(space, configs, "s", {**point, "max_batch_size": size})
        assert list(changed["s-engine"].dynamic_batching.preferred_batch_size) in (preferred, [4, 8, 16])
        assert changed["s"].max_batch_size == changed["s-engine"].max_batch_size == size


def test_an_unsound_winner_changes_nothing(repository: Path) -> None:
    configs = read_configs(repository, "g")
    space = space_of(configs, "g", {})
    bad = with_point(space, configs, "g", {**read_point(space, configs, "g"), "prefill_chunk": 256})
    before = {path: path.read_bytes() for path in repository.rglob("config.pbtxt")}
    with pytest.raises(CheckError, match="prefill_chunk is 256"):
        put_configs(repository, bad)
    assert {path: path.read_bytes() for path in repository.rglob("config.pbtxt")} == before


def test_an_interrupt_while_writing_changes_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = read_configs(repository, "s")
    space = space_of(configs, "s", {})
    names = ("max_batch_size", "max_queue_delay_us", "tokenizer_instances", "scorer_instances")
    changed = with_point(space, configs, "s", dict(zip(names, (2, 0, 2, 2), strict=True)))
    before = {path: path.read_bytes() for path in repository.rglob("config.pbtxt")}
    calls: list[Path] = []

    def interrupted(path: Path, data: Any, error_type: Any) -> None:
        write_atomically(path, data, error_type)
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuned_repository, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put_configs(repository, changed)
    assert {path: path.read_bytes() for path in repository.rglob("config.pbtxt")} == before


def test_what_is_no_ensemble_is_refused(repository: Path) -> None:
    with pytest.raises(TuneError, match="s-engine is no ensemble"):
        read_configs(repository, "s-engine")
    with pytest.raises(TuneError, match=r"nobody/config.pbtxt: No such file"):
        read_configs(repository, "nobody")


# The command, its measurements replaced


@pytest.fixture
def measured_points(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Points as they are measured; the fastest has a batch of 16 and 2 tokenizers."""
    points: list[dict[str, int]] = []

    def measure(options: TuneOptions, configs: Any, texts: Any, ask: Any) -> Measurement:
        space = space_of(configs, "s", {})
        point = read_point(space, configs, "s")
        points.append(point)
        return found(50 - abs(point["max_batch_size"] - 16) + 5 * point["tokenizer_instances"], 40)

    monkeypatch.setattr(command, "_measure", measure)
    return points


def options(repository: Path, **changes: Any) -> TuneOptions:
    values: dict[str, Any] = {
        "name": "s",
        "repository": repository,
        "p99_ms": LIMIT_MS,
        "output": repository.parent / "out",
    }
    return TuneOptions(**{**values, **changes})


def test_tune_writes_the_winner_and_what_it_saw(repository: Path, measured_points: list[dict[str, int]]) -> None:
    tuned = tune(options(repository))
    assert tuned.best is not None and tuned.is_complete
    assert (tuned.best.point["max_batch_size"], tuned.best.point["tokenizer_instances"]) == (16, 2)
    configs = read_configs(repository, "s")
    assert (configs["s-engine"].max_batch_size, configs["s-tokenizer"].instance_group[0].count) == (16, 2)
    assert {path.name for path in (repository.parent / "out").iterdir()} == {
        "journal.jsonl", "table.txt", "throughput.png",
    }  # fmt: skip
    assert (repository.parent / "out" / "throughput.png").stat().st_size > 5000
    lines = (repository.parent / "out" / "table.txt").read_text().splitlines()
    assert lines[1].startswith("*") and len(lines) == 1 + len(measured_points)


def test_a_run_that_was_killed_goes_on_where_it_was(
    repository: Path, measured_points: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(options(repository, is_dry=True, output=repository.parent / "whole"))
    measured_points.clear()
    real = command._measure

    def killed(*arguments: Any) -> Measurement:
        if len(measured_points) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(command, "_measure", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(options(repository))
    assert len(measured_points) == 3
    resumed = tune(options(repository))
    assert resumed.best == whole.best
    assert len(measured_points) == len(whole.measured), "no point was measured twice"


def test_the_budget_bounds_the_search(repository: Path, measured_points: list[dict[str, int]]) -> None:
    tuned = tune(options(repository, budget_s=1e-9))
    assert not tuned.is_complete and tuned.best is None and tuned.changed == []
    assert measured_points == []


def test_a_journal_of_another_load_is_refused(repository: Path, measured_points: list[dict[str, int]]) -> None:
    tune(options(repository, is_dry=True))
    with pytest.raises(TuneError, match="is of another run: clients is 16 there and 4 now"):
        tune(options(repository, clients=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p99_ms": 0.0}, "p99_ms is 0.0, must be finite and above 0"),
        ({"budget_s": float("nan")}, "budget_s is nan"),
        ({"clients": 0}, "clients is 0, must be at least 1"),
    ],
)
def test_options_at_fault(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TuneError, match=message):
        options(tmp_path, **change)


def test_texts_are_lines(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a\n\n  b \n")
    assert read_texts(tmp_path / "t") == ["a", "b"]
    assert len(read_texts(None)) > 3 and max(map(len, read_texts(None))) <= 240
    (tmp_path / "t").write_text("\n")
    for path, message in ((tmp_path / "t", "holds no text"), (tmp_path / "no", "can't be read")):
        with pytest.raises(TuneError, match=message):
            read_texts(path)


def test_the_command_tells_what_it_found(
    repository: Path, measured_points: list[dict[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tune", "s", "--repository", str(repository), "--output", str(repository.parent / "out")]
    assert cli.main([*arguments, "--p99-ms", "1"]) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "error: no point is within 1 ms; raise --p99-ms, or lower --clients"
    assert cli.main([*arguments, "--p99-ms", "100"]) == 0
    out = capsys.readouterr().out
    assert "max_batch_size" in out and f"wrote {repository / 's-engine' / 'config.pbtxt'}" in out
    assert cli.main(["tune", "s", "--p99-ms", "1", "--repository", str(repository), "--clients", "0"]) == 1
    assert capsys.readouterr().err == "error: clients is 0, must be at least 1\n"


# Load


class FakeClient:
    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_load_counts_what_is_answered_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GrpcClient", FakeClient)
    result = load(lambda client, text: time.sleep(0.01), "x:1", "m", ["a"], clients=4, seconds=0.5)
    assert not result.failure and 100 < result.num_requests <= 220
    assert result.throughput == result.num_requests / 0.5
    assert 10 <= result.p50_ms <= result.p99_ms < 200


def test_a_load_with_one_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GrpcClient", FakeClient)

    def ask(client: Any, text: str) -> None:
        raise RequestRejected("queue\nis full")

    assert load(ask, "x:1", "m", ["a"], clients=2, seconds=5).failure == "queue is full"
    assert "no request was answered" in load(lambda c, t: time.sleep(0.2), "x:1", "m", ["a"], 1, 0.1).failure


def test_a_point_that_cannot_be_served_is_a_result(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = read_configs(repository, "g")
    space = space_of(configs, "g", {})
    bad = with_point(space, configs, "g", {**read_point(space, configs, "g"), "prefill_chunk": 256})
    result = command._measure(SimpleNamespace(repository=repository), bad, ["a"], None)  # type: ignore[arg-type]
    assert "prefill_chunk is 256" in result.failure and "\n" not in result.failure
    assert json.dumps(result.failure)
