"""`make release-check`: may this be released? Loads smoke and steady, and hostile requests, against the last records.

A run of a profile passes if it is valid, holds its service levels, and is not slower than the recorded run of the same
machine: no figure's 95 % interval lies wholly more than SLOWER worse. Speed is judged by that record alone, never by
figures of another machine: twice its 99th percentiles are the levels. What a busy minute of the machine can cause, an
invalid or a slower run, counts only if a second run has it too. The first run on a machine is recorded, and compared
with nothing; `--record` replaces the record by a run that passes. Exit status: 0 passed, 1 failed, 4 a run was invalid,
so that nothing can be said.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deepseek_triton.ensemble.processes.machine import describe
from deepseek_triton.loadtest.against import judged_against, machine_name
from deepseek_triton.loadtest.compare import compare
from deepseek_triton.loadtest.levels import check
from deepseek_triton.loadtest.profile import Levels, LoadProfileError
from deepseek_triton.loadtest.result import LoadTestResult, ResultError, load
from deepseek_triton.loadtest.status import Status, status_of
from deepseek_triton.loadtest.verdict import amount

PROFILES = ("smoke", "steady")
SLOWER = 0.1
FUZZ = "tests/serving/test_fuzz.py"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finding:
    """What one part of the check found; `lines` explain it. may_be_chance: a busy machine can have caused it."""

    name: str
    status: Status
    lines: tuple[str, ...]
    may_be_chance: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run every part, say what was compared with what, and end with the worst status."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="make release-check", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--folder", type=Path, default=Path("build/release"), help="default: %(default)s")
    parser.add_argument("--profiles", default=",".join(PROFILES), help="default: %(default)s")
    parser.add_argument("--record", action="store_true", help="record the runs that pass, in place of earlier ones")
    parser.add_argument("--no-fuzz", action="store_true", help="leave the hostile requests out")
    arguments, run_options = parser.parse_known_args(argv)
    records = arguments.folder / "records" / re.sub(r"\W+", "-", machine_name(describe()))

    def run(name: str) -> Finding:
        output, record = arguments.folder / name, records / f"{name}.json"
        shutil.rmtree(output, ignore_errors=True)
        options = ["--output", str(output), *(["--against", str(record)] if record.is_file() else []), *run_options]
        command = [sys.executable, "-m", "deepseek_triton.loadtest.run", name, *options]
        ended = subprocess.run(command, cwd=ROOT, check=False).returncode
        return judge(name, ended, output / "result.json", record, replace=arguments.record)

    began = time.monotonic()
    findings = [twice_if_chance(partial(run, name)) for name in arguments.profiles.split(",")]
    if not arguments.no_fuzz:
        fuzz = subprocess.run([sys.executable, "-m", "pytest", "-q", FUZZ], cwd=ROOT, check=False).returncode
        findings.append(Finding("fuzz", Status.OK if fuzz == 0 else Status.ERROR, (f"{FUZZ} ended with {fuzz}",)))
    for found in findings:
        word = {Status.OK: "passed", Status.INVALID: "can't be judged"}.get(found.status, "FAILED")
        print(f"{found.name}: {word}")
        for line in found.lines:
            print(f"  {line}")
    print(f"it took {time.monotonic() - began:.0f} s")
    statuses = {found.status for found in findings}
    return next((int(each) for each in (Status.ERROR, Status.INVALID) if each in statuses), Status.OK)


def twice_if_chance(run: Callable[[], Finding]) -> Finding:
    """Run; once more if what was found may be chance. The second finding counts, and tells of the first."""
    first = run()
    if not first.may_be_chance:
        return first
    print(f"{first.name}: {first.lines[-1]}; once more", flush=True)
    second = run()
    return dataclasses.replace(second, lines=(f"the second run; of the first: {first.lines[-1]}", *second.lines))


def judge(name: str, ended: int, result: Path, record: Path, *, replace: bool) -> Finding:
    """Judge one finished run.

    ended: its exit status. record: where the machine's record is or will be. replace: record a run that passes.
    """
    try:
        now = load(result)
    except ResultError as error:
        return Finding(name, Status.ERROR, (f"the run ended with status {ended} and without a result: {error}",))
    if status_of(now) == Status.INVALID:
        lines = tuple(each.sentence() for each in now.checks if not each.is_met)
        return Finding(name, Status.INVALID, lines, may_be_chance=True)
    whole = Levels(max_error_ratio=now.profile.levels.max_error_ratio)
    if failed := _missed(now, whole):
        return Finding(name, Status.ERROR, failed)
    if not record.is_file():
        return _recorded(name, result, record, "no earlier run of this machine is recorded, so speed wasn't judged")
    try:
        before = load(record)
        levels = judged_against(now.profile, before, now.target.model, now.machine).levels
    except (ResultError, LoadProfileError) as error:
        return Finding(name, Status.ERROR, (f"{error}; remove {record}, and the next run is recorded",))
    compared = f"compared with the run of {before.started}, {machine_name(before.machine)}: {record}"
    if worse := (*_missed(now, levels), *slower(before, now)):
        return Finding(name, Status.ERROR, (compared, *worse), may_be_chance=True)
    if replace:
        return _recorded(name, result, record, compared)
    return Finding(name, Status.OK, (compared, f"no figure is surely more than {SLOWER:.0%} worse"))


def _missed(now: LoadTestResult, levels: Levels) -> tuple[str, ...]:
    return tuple(level.sentence() for level in check(levels, now.summary) if not level.is_met)


def slower(before: LoadTestResult, now: LoadTestResult) -> tuple[str, ...]:
    """One line for each figure whose whole interval is more than SLOWER worse."""
    lines = []
    for each in compare(before, now).differences:
        if each.conclusion != "worse" or each.low is None or each.high is None or not each.a:
            continue
        least = min(abs(each.low), abs(each.high)) / each.a
        if least > SLOWER:
            lines.append(
                f"{each.name}: {amount(each.a, each.unit)}, now {amount(each.b, each.unit)}; surely {least:.0%} worse"
            )
    return tuple(lines)


def _recorded(name: str, result: Path, record: Path, why: str) -> Finding:
    record.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(result, record)
    return Finding(name, Status.OK, (why, f"recorded: {record}"))


if __name__ == "__main__":
    sys.exit(main())
