"""A run's result: observations in, one JSON file out, and back. The report and `compare` read only this file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.loadtest import agreement, engine, levels, measure, metrics, profile, usage, validity
from deepseek_triton.loadtest.engine import EngineCourse, EngineWork
from deepseek_triton.loadtest.measure import Backlog, Course, Summary
from deepseek_triton.loadtest.metrics import ModelWork
from deepseek_triton.loadtest.profile import LoadProfile
from deepseek_triton.loadtest.sample import Sample, from_columns, to_columns
from deepseek_triton.loadtest.target import ServerUnderTest
from deepseek_triton.loadtest.usage import UsageCourse
from deepseek_triton.loadtest.validity import Observed
from deepseek_triton.loadtest.verdict import Verdict

FORMAT = 2
FAILED = "failed"  # stands for an infinite percentile in JSON


class ResultError(ValueError):
    """The file isn't a run's result; the message says why."""


@dataclass(frozen=True)
class LoadTestResult:
    """The result of one run."""

    profile: LoadProfile
    target: ServerUnderTest
    started: str  # ISO 8601
    machine: dict[str, Any]
    checks: list[Verdict]  # whether the run is valid
    levels: list[Verdict]  # whether the service levels are met
    summary: Summary
    protocols: dict[str, Summary]
    course: Course
    server: dict[str, ModelWork]  # each Triton model's work after the warm-up
    server_course: dict[str, dict[str, list[float | None]]]
    engine: EngineWork | None  # the engine's own figures after the warm-up
    engine_course: EngineCourse | None
    usage_course: UsageCourse  # use of this machine's processors
    errors: dict[str, int]  # message → number of requests
    samples: list[Sample]  # includes those of the warm-up, which are due before 0

    @property
    def is_valid(self) -> bool:
        """Whether every validity check is met."""
        return all(check.is_met for check in self.checks)

    @property
    def missed(self) -> list[Verdict]:
        """The service levels that were missed."""
        return [level for level in self.levels if not level.is_met]

    def save(self, path: Path) -> None:
        """Write JSON, one line for each field."""
        table = dataclasses.asdict(dataclasses.replace(self, samples=[]))
        table = {"format": FORMAT} | _plain(table) | {"samples": to_columns(self.samples)}
        lines = (f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in table.items())
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def assemble(
    run: LoadProfile, target: ServerUnderTest, started: str, machine: dict[str, Any], observed: Observed
) -> LoadTestResult:
    """Compute every figure of a run."""
    counted = measure.counted(observed.samples)
    last = max([run.duration_s, *(sample.end_s for sample in observed.samples)])
    edges = measure.course_edges(-run.warmup_s, last)
    summary = measure.summarise(counted, run.duration_s)
    tokens = observed.tokens
    readings = observed.readings
    after_warmup = [reading for reading in readings if reading.at_s >= 0]
    whole = metrics.work(readings[0], readings[-1]) if readings else {}
    around = {
        part: work
        for part, work in whole.items()
        if part.startswith(f"{target.model}-") and not engine.is_engine(part, target.model)
    }
    return LoadTestResult(
        profile=run,
        target=target,
        started=started,
        machine=machine,
        checks=validity.check(observed)
        + agreement.check(observed.samples, engine.work(readings, target.model), around),
        levels=levels.check(run.levels, summary),
        summary=summary,
        protocols={
            name: measure.summarise([s for s in counted if s.protocol == name], run.duration_s)
            for name in run.protocols
        },
        course=measure.course(observed.samples, tokens, edges),
        server=metrics.work(after_warmup[0], after_warmup[-1]) if after_warmup else {},
        server_course=metrics.course(readings, edges),
        engine=engine.work(after_warmup, target.model),
        engine_course=engine.course(readings, target.model, edges),
        usage_course=usage.course(observed.usage, edges, observed.cores, is_server_here=observed.is_server_here),
        errors=_count([_message(sample) for sample in counted if not sample.is_complete]),
        samples=list(observed.samples),
    )


def load(path: Path) -> LoadTestResult:
    """Read a file that `LoadTestResult.save` wrote. Raises `ResultError`."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        found = table.get("format") if isinstance(table, dict) else table
        raise ResultError(f"{path} must be a load test's result of format {FORMAT}, got {found!r:.80}")
    try:
        return LoadTestResult(
            profile=profile.from_dict(table["profile"]),
            target=ServerUnderTest(**table["target"]),
            started=table["started"],
            machine=table["machine"],
            checks=[Verdict(**_infinite(check)) for check in table["checks"]],
            levels=[Verdict(**_infinite(level)) for level in table["levels"]],
            summary=_summary(table["summary"]),
            protocols={name: _summary(each) for name, each in table["protocols"].items()},
            course=Course(**_infinite(table["course"])),
            server={model: ModelWork(**each) for model, each in table["server"].items()},
            server_course=table["server_course"],
            engine=_engine(table["engine"]),
            engine_course=None if table["engine_course"] is None else EngineCourse(**table["engine_course"]),
            usage_course=UsageCourse(**table["usage_course"]),
            errors=table["errors"],
            samples=from_columns(table["samples"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{path} is not a whole result: {error}") from error


def _summary(table: dict[str, Any]) -> Summary:
    kinds: dict[str, Any] = {"backlog": Backlog}
    fields: dict[str, Any] = {
        name: kinds.get(name, measure.Distribution)(**_infinite(value)) if isinstance(value, dict) else value
        for name, value in table.items()
    }
    return Summary(**fields)


def _engine(table: dict[str, Any] | None) -> EngineWork | None:
    if table is None:
        return None
    spreads = {name: engine.Spread(**_spread(table[name])) for name in ("first_token_s", "inter_token_s")}
    return EngineWork(**(table | spreads))


def _spread(table: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(math.inf if each == FAILED else each for each in value) if isinstance(value, list) else value
        for name, value in table.items()
    }


def _message(sample: Sample) -> str:
    return sample.error or f"the answer ended with finish_reason {sample.finish_reason!r}"


def _count(messages: Sequence[str]) -> dict[str, int]:
    """Message → number of its occurrences, the most frequent first."""
    counts = {message: messages.count(message) for message in set(messages)}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _plain(value: Any) -> Any:
    """Values for JSON: floats with six significant digits, FAILED for an infinite one."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return FAILED if math.isinf(value) else float(f"{value:.6g}")
    return value


def _infinite(table: dict[str, Any]) -> dict[str, Any]:
    return {key: math.inf if value == FAILED else value for key, value in table.items()}
