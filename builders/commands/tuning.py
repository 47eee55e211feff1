"""Tuning: search for the configuration that serves most requests within a latency limit.

The search measures each of its points once. Then the start and the best candidates are measured in several rounds, and
a candidate is written into the repository only if it is better beyond the noise. Every measurement starts a server on a
copy of the model's parts, and is recorded in a journal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from deepseek_triton.builders.commands.tune_load import TuneLoad, asker, measure, read_texts
from deepseek_triton.builders.repository.options import Report
from deepseek_triton.builders.tune.clock import Clock
from deepseek_triton.builders.tune.confirm import Decision, contenders, decide, order
from deepseek_triton.builders.tune.fingerprint import configs_digest, fingerprint
from deepseek_triton.builders.tune.journal import Journal
from deepseek_triton.builders.tune.measurement import Measured, Measurement
from deepseek_triton.builders.tune.options import NUM_CANDIDATES, TuneError, TuneOptions
from deepseek_triton.builders.tune.report import decision_table, plot, search_table
from deepseek_triton.builders.tune.repository import finish_pending, newest_version, put_configs, read_configs
from deepseek_triton.builders.tune.search import Axis, is_within, search
from deepseek_triton.builders.tune.space import (
    Configs,
    Parameter,
    Point,
    limits_of,
    read_point,
    space_of,
    with_point,
)
from deepseek_triton.ensemble.protocol.pipelines import ENGINE_SUFFIX, model_name
from deepseek_triton.ensemble.server.tritonserver import ServerError, find_tritonserver
from deepseek_triton.loadtest.intervals import CONFIDENCE

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    measured: every point of the search. decision: None where it wasn't made: no candidate, or no time. changed: files
    written. is_complete: whether the budget was enough. is_held: whether what the repository should now say holds the
    limit.
    """

    start: dict[str, int]
    measured: list[Measured]
    decision: Decision | None
    changed: list[Path]
    is_complete: bool
    is_held: bool
    table: str


def tune(
    options: TuneOptions, report: Report = lambda what, done, total: None, tell: Tell = lambda line: None
) -> Tuned:
    """Search, confirm, and write a winner into the repository.

    Raises:
        BuildError: the model, the journal, the machine or an option is at fault; the repository is as it was.
    """
    if finished := finish_pending(options.repository):
        tell(f"finished what a killed run had begun to write: {', '.join(finished)}")
    configs = read_configs(options.repository, options.name)
    if not options.is_dry:
        _require_writable(options.repository, configs)
    space = space_of(configs, options.name, limits_of(_engine_version(options)))
    start = read_point(space, configs, options.name)
    texts = read_texts(options.texts)
    load = TuneLoad(
        texts,
        options.clients,
        options.seconds,
        asker(options.name, configs, options.labels, options.max_tokens),
    )
    try:
        find_tritonserver()
    except ServerError as error:
        raise TuneError(str(error)) from error
    clock = Clock(options.budget_s, load.seconds_in_all, report)
    _tell_plan(options, load, space, tell)
    with Journal(options.directory / "journal.jsonl", _fingerprint(options, configs, texts)) as journal:
        bench = _Bench(options, space, configs, load, journal, clock, tell)
        measured, is_searched = _search(bench, space, start)
        points = contenders(measured, start, options.p99_ms)
        rounds = _confirm(bench, points) if len(points) > 1 else []
    is_decided = len(rounds) == options.rounds
    decision = decide(points, rounds, options.p99_ms) if is_decided else None
    text = _save(options, start, measured, decision)
    changed: list[Path] = []
    winner = decision.winner if decision else None
    if winner is not None and not options.is_dry:
        changed = put_configs(options.repository, with_point(space, configs, options.name, winner.point))
    is_complete = is_searched and (is_decided or len(points) == 1)
    return Tuned(start, measured, decision, changed, is_complete, _is_held(measured, start, decision, options), text)


def conclusion(tuned: Tuned) -> str:
    """The outcome of tuning, in a few words."""
    if tuned.changed:
        return "start the server again"
    if tuned.decision is None:
        return "nothing chosen, the configuration stays" if tuned.is_complete else "nothing chosen yet"
    if tuned.decision.winner is None:
        return "nothing is better than the start beyond the noise: the configuration stays"
    return "nothing written, as asked"


class _Bench:
    """Measures configurations of one model within the budget, and prints each result."""

    def __init__(
        self,
        options: TuneOptions,
        space: list[Parameter],
        configs: Configs,
        load: TuneLoad,
        journal: Journal,
        clock: Clock,
        tell: Tell,
    ) -> None:
        self.options = options
        self.journal = journal
        self.clock = clock
        self.tell = tell
        self._space = space
        self._configs = configs
        self._load = load

    def digest(self, point: Point) -> str:
        return configs_digest(self._at(point))

    def measure(self, point: Point, when: str) -> Measurement:
        with self.clock.measurement():
            result = measure(self.options.repository, self.options.name, self._at(point), self._load)
        told = result.failure or f"{result.throughput:.2f} requests/s, p99 {result.p99_ms:.0f} ms"
        self.tell(f"{when}: {', '.join(f'{name} {value}' for name, value in point.items())}: {told}")
        return result

    def _at(self, point: Point) -> Configs:
        return with_point(self._space, self._configs, self.options.name, point)


def _search(bench: _Bench, space: list[Parameter], start: Point) -> tuple[list[Measured], bool]:
    """Return the points that were measured, and whether the search was finished within the budget.

    Raises:
        TuneError: the start can't be measured, so there is nothing to compare with.
    """
    is_complete, num_known = True, 0

    def at(point: Point) -> Measurement | None:
        nonlocal is_complete, num_known
        digest = bench.digest(point)
        if (known := bench.journal.get(digest)) is not None:
            num_known += 1
            return known
        if not bench.clock.leaves_room(1 + bench.options.num_confirming):
            needed = f"{bench.options.num_confirming} confirming measurements x {bench.clock.longest_s:.0f} s"
            bench.tell(f"no time for another point: the rest of the budget is kept for {needed}")
            is_complete = False
            return None
        result = bench.measure(point, "search")
        if result.failure and point == start:
            raise TuneError(f"{bench.options.name} as it is can't be measured: {result.failure}")
        bench.journal.add(digest, Measured(dict(point), result))
        return result

    axes = [Axis(parameter.name, parameter.values) for parameter in space]
    measured = search(axes, start, at, bench.options.p99_ms)
    if num_known:
        bench.tell(f"{num_known} of {len(measured)} points were in {bench.journal.path}")
    return measured, is_complete


def _confirm(bench: _Bench, points: Sequence[Point]) -> list[list[Measurement]]:
    """Measure every point in each round, for as many rounds as were asked for or fit into the budget."""
    digests = [bench.digest(point) for point in points]
    rounds: list[list[Measurement]] = []
    known = [bench.journal.get_round(number, digests) for number in range(bench.options.rounds)]
    num_left = known.count(None) * len(points)
    seconds = bench.clock.longest_s
    bench.tell(
        f"confirming: {bench.options.rounds} rounds of the start and {len(points) - 1} candidates; "
        f"{num_left} measurements to do x {seconds:.0f} s = {num_left * seconds:.0f} s"
        f"{'' if bench.clock.has_measured else ' and as many starts'}"
    )
    for number, found in enumerate(known):
        if found is None:
            if not bench.clock.leaves_room(len(points)):
                break
            when = f"round {number + 1} of {bench.options.rounds}"
            results = {i: bench.measure(points[i], when) for i in order(len(points), number)}
            if results[0].failure:
                raise TuneError(f"{bench.options.name} as it is can't be measured: {results[0].failure}")
            found = [results[i] for i in range(len(points))]
            bench.journal.add_round(number, dict(zip(digests, found, strict=True)))
        rounds.append(found)
    return rounds


def _tell_plan(options: TuneOptions, load: TuneLoad, space: list[Parameter], tell: Tell) -> None:
    one = load.seconds_in_all
    least = options.num_confirming * one
    if least + one > options.budget_s:
        what = f"{options.num_confirming} confirming measurements of {one:g} s alone need {least:g} s"
        raise TuneError(f"budget_s is {options.budget_s:g}; {what}: raise --budget-s, or lower --seconds or --rounds")
    tell(
        f"searching {', '.join(parameter.name for parameter in space)}: {one:g} s a point and a server's start\n"
        f"then confirming: {options.rounds} rounds of the start and at most {NUM_CANDIDATES} candidates, "
        f"{options.num_confirming} measurements x {one:g} s = {least:g} s and as many starts\n"
        f"in all at most {options.budget_s:g} s"
    )


def _engine_version(options: TuneOptions) -> Path:
    return newest_version(options.repository / model_name(options.name, ENGINE_SUFFIX))


def _require_writable(repository: Path, configs: Configs) -> None:
    """Refuse a repository that a winner couldn't be written to, before anything is measured."""
    for directory in (repository, *(repository / name for name in configs)):
        if not os.access(directory, os.W_OK):
            raise TuneError(f"{directory} can't be written to, so a winner couldn't be: --dry-run only measures")


def _fingerprint(options: TuneOptions, configs: Configs, texts: Sequence[str]) -> dict[str, object]:
    load = {name: getattr(options, name) for name in ("clients", "seconds", "max_tokens")}
    digest = sha256("\n".join(texts).encode()).hexdigest()[:24]
    load |= {"model": options.name, "labels": list(options.labels), "texts": digest}
    return fingerprint(options.repository, configs, load)


def _is_held(measured: list[Measured], start: Point, decision: Decision | None, options: TuneOptions) -> bool:
    if decision is None:
        return any(one.point == start and is_within(one.result, options.p99_ms) for one in measured)
    p99_s = decision.confirmed[0].p99_s
    return decision.winner is not None or (p99_s is not None and p99_s.value * 1e3 <= options.p99_ms)


def _save(options: TuneOptions, start: Point, measured: list[Measured], decision: Decision | None) -> str:
    text = search_table(measured, start, options.p99_ms) + "\n"
    if decision is not None:
        text += f"\n{decision_table(decision, options.rounds)}\n"
    try:
        (options.directory / "table.txt").write_text(text, encoding="utf-8")
    except OSError as error:
        raise TuneError(f"{options.directory}: {error.strerror}; make room, the same command goes on") from error
    title = f"{options.name}, {options.clients} clients"
    if decision is not None:
        title += f"; bars: {options.rounds} rounds, {CONFIDENCE:.0%} intervals"
    plot(measured, start, decision, options.p99_ms, title, options.directory / "throughput.png")
    return text
