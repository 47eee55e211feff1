"""Tuning without a server: the space, the search, and how the winner gets into the repository."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.repository.check import CheckError, check_repository
from deepseek_triton.builders.repository.pbtxt import to_text
from deepseek_triton.builders.tune import repository as tuned_repository
from deepseek_triton.builders.tune.measurement import Measurement
from deepseek_triton.builders.tune.options import TuneError
from deepseek_triton.builders.tune.repository import copied, finish_pending, put_configs, read_configs
from deepseek_triton.builders.tune.search import Axis, is_better, search
from deepseek_triton.builders.tune.space import Point, read_point, space_of, with_point
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.server import supervisor
from tests.support.tuning import found, point_of, tiny_repository

LIMIT_MS = 100.0


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
    best = max(measured, key=lambda one: one.result.throughput)
    assert best.point == {"batch": 8, "delay": 2000}
    assert len({tuple(point.items()) for point in asked}) == len(asked) == len(measured) < 20


def test_the_search_looks_beyond_one_value_that_noise_may_have_spoilt() -> None:
    def measure(point: Point) -> Measurement:
        return found({1: 50, 2: 49, 4: 60, 8: 59, 16: 58, 32: 90}[point["batch"]])

    axes = [AXES[0]]
    tried = [one.point["batch"] for one in search(axes, {"batch": 1}, measure, LIMIT_MS)]
    assert tried == [1, 2, 4, 8, 16], "over 2 to 4, one value beyond 8, and no further; what was tried isn't again"


def test_the_search_does_not_look_beyond_a_clear_loss() -> None:
    def measure(point: Point) -> Measurement:
        return found({1: 50, 2: 40, 4: 90}.get(point["batch"], 1))

    assert [one.point["batch"] for one in search([AXES[0]], {"batch": 1}, measure, LIMIT_MS)] == [1, 2]
    slow = search([AXES[0]], {"batch": 1}, lambda point: found(50, 10 if point["batch"] == 1 else 101), LIMIT_MS)
    assert len(slow) == 2, "over the limit is a clear loss"


def test_the_search_ends_with_what_it_has_when_time_is_up() -> None:
    left = iter(range(3))
    measured = search(AXES, {"batch": 1, "delay": 0}, lambda p: hill(p) if next(left, None) is not None else None, 100)
    assert len(measured) == 3
    assert search(AXES, {"batch": 1, "delay": 0}, lambda point: None, 100) == []


# The space, and a repository


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def repository(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / built.name


@pytest.mark.slow
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
            {"max_num_seqs": 3, "max_num_batched_tokens": 8, "tokenizer_instances": 1},
            {"max_num_seqs": 16, "max_num_batched_tokens": 32, "tokenizer_instances": 2},
        ),
    ],
)
def test_a_point_is_written_and_read_back(name: str, start: Point, point: Point, repository: Path) -> None:
    configs = read_configs(repository, name)
    space = space_of(configs, name, {"max_num_batched_tokens": 32})
    assert read_point(space, configs, name) == start
    assert all(start[parameter.name] in parameter.values for parameter in space)
    assert max(next(p.values for p in space if p.name == "max_num_batched_tokens") if name == "g" else (32,)) == 32
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
    bad = with_point(space, configs, "g", {**read_point(space, configs, "g"), "max_num_batched_tokens": 256})
    before = {path: path.read_bytes() for path in repository.rglob("config.pbtxt")}
    with pytest.raises(CheckError, match="max_num_batched_tokens is 256"):
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
        if len(calls) == 3:  # the record, and two of the files
            raise KeyboardInterrupt

    monkeypatch.setattr(tuned_repository, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put_configs(repository, changed)
    assert {path: path.read_bytes() for path in repository.rglob("config.pbtxt")} == before


WRITER = """
import sys
from pathlib import Path
from deepseek_triton.builders.tune.repository import put_configs, read_configs
from deepseek_triton.builders.tune.space import read_point, space_of, with_point
from tests.support.killed_writer import kill_after

repository = Path(sys.argv[1])
configs = read_configs(repository, "s")
space = space_of(configs, "s", {})
names = ("max_batch_size", "max_queue_delay_us", "tokenizer_instances", "scorer_instances")
kill_after(int(sys.argv[2]))
put_configs(repository, with_point(space, configs, "s", dict(zip(names, (2, 0, 2, 2), strict=True))))
"""


@pytest.mark.slow
def test_a_kill_while_writing_leaves_the_old_or_the_new(repository: Path) -> None:
    """The process is killed before the first rename, the second, and so on; then the next command comes along."""
    old, root = point_of(repository), Path(__file__).parents[3]
    before = {path: path.read_bytes() for path in repository.rglob("config.pbtxt")}
    new = {"max_batch_size": 2, "max_queue_delay_us": 0, "tokenizer_instances": 2, "scorer_instances": 2}
    ends: list[Point] = []
    for num_renames in range(6):
        done = subprocess.run([sys.executable, "-c", WRITER, str(repository), str(num_renames)], cwd=root, check=False)
        assert done.returncode == (-signal.SIGKILL if num_renames < 5 else 0)
        finished = finish_pending(repository)
        assert bool(finished) == (0 < num_renames < 5), "the record is the first file that is renamed"
        ends.append(point_of(repository))
        assert check_repository(repository) == [] and finish_pending(repository) == []
        for path, data in before.items():
            path.write_bytes(data)
    assert ends == [old] + [new] * 5


@pytest.mark.slow
def test_what_was_changed_since_the_kill_stays(repository: Path) -> None:
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", WRITER, str(repository), "2"], cwd=root, check=False)
    assert len(list(repository.glob(".*.json"))) == 1
    configs = read_configs(repository, "s")
    changed = configs["s-scorer"]
    changed.instance_group[0].count = 3
    (repository / "s-scorer" / "config.pbtxt").write_text(to_text(changed))
    kept = {path: path.read_bytes() for path in repository.rglob("config.pbtxt")}
    assert finish_pending(repository) == []
    assert {path: path.read_bytes() for path in repository.rglob("config.pbtxt")} == kept
    assert not list(repository.glob(".*.json"))


@pytest.mark.slow
def test_serve_finishes_what_a_killed_run_began(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", WRITER, str(repository), "2"], cwd=root, check=False)
    served: list[Point] = []
    monkeypatch.setattr(supervisor, "supervise", lambda *_, **__: served.append(point_of(repository)))
    assert cli.main(["serve", str(repository)]) == 0
    assert list(served[0].values()) == [2, 0, 2, 2]
    assert "s-engine: finished writing the configuration that a killed `tune` had chosen" in capsys.readouterr().out


def test_a_record_that_cannot_be_read_is_told(repository: Path) -> None:
    record = repository / tuned_repository.PENDING.format("s")
    record.write_text('{"s": 1}')
    with pytest.raises(
        TuneError, match=r"\.s\.tuned\.json can't be finished: .*; remove it, then build the model again"
    ):
        finish_pending(repository)
    assert record.exists()


def test_what_is_no_ensemble_is_refused(repository: Path) -> None:
    with pytest.raises(TuneError, match="s-engine is no ensemble"):
        read_configs(repository, "s-engine")
    with pytest.raises(TuneError, match=r"nobody/config.pbtxt: No such file .*; the repository's models are g, s$"):
        read_configs(repository, "nobody")
