"""Derives service levels from valid runs of one profile.

`python -m deepseek_triton.loadtest.basis a.json b.json …` prints the tables [levels] and [basis] of the profile. A
level is `margin` times the median of the runs, so that random variation rarely misses it but a service half as fast
does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_triton.command_parser import CommandParser
from deepseek_triton.extras import exit_with
from deepseek_triton.loadtest.levels import LEVELS
from deepseek_triton.loadtest.profile import Basis, Levels, LoadProfileError
from deepseek_triton.loadtest.result import LoadTestResult, ResultError, load

MARGIN = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns 1 if a file isn't a result or a run is invalid or of another profile."""
    parser = CommandParser(
        prog="python -m deepseek_triton.loadtest.basis", description="Service levels from measured runs of one profile."
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--margin", type=float, default=MARGIN, help="times the median (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        print(tables(*measure([load(path) for path in arguments.results], arguments.margin)))
    except (LoadProfileError, ResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(results: Sequence[LoadTestResult], margin: float) -> tuple[Levels, Basis]:
    """Return new limits for the levels that the runs' profile has.

    Raises:
        LoadProfileError: a run is invalid, of another profile, or lacks a value.
    """
    first = results[0]
    for result in results:
        if not result.is_valid:
            raise LoadProfileError(f"the run of {result.started} is invalid, and no basis for a service level")
        if result.profile.load != first.profile.load:
            raise LoadProfileError(f"the runs of {first.started} and {result.started} are of different profiles")
    runs: dict[str, tuple[float, ...]] = {}
    for name, (_, _, figure, _) in LEVELS.items():
        if name not in Basis.WITHOUT_MARGIN and getattr(first.profile.levels, name) is not None:
            runs[name] = tuple(_present(figure(result.summary), name, result) for result in results)
    machine = f"{first.machine['processor']}, {first.machine['cores']} cores"
    basis = Basis(margin, machine, runs)
    limits: dict[str, Any] = {name: basis.limit(name) for name in runs}
    return Levels(max_error_ratio=0, **limits), basis


def tables(levels: Levels, basis: Basis) -> str:
    """Return both tables as TOML."""
    limits = {name: limit for name in LEVELS if (limit := getattr(levels, name)) is not None}
    return "\n".join(
        (
            "[levels]",
            *(f"{name} = {limit:g}" for name, limit in limits.items()),
            "",
            "[basis]",
            f"margin = {basis.margin:g}",
            f'machine = "{basis.machine}"',
            "",
            "[basis.runs]",
            *(f"{name} = [{', '.join(f'{value:g}' for value in values)}]" for name, values in basis.runs.items()),
        )
    )


def _present(value: float | None, name: str, result: LoadTestResult) -> float:
    if value is None:
        raise LoadProfileError(f"the run of {result.started} has no figure for {name}")
    return float(f"{value:.4g}")  # rounded as in the file, so that the level follows from the file's values


if __name__ == "__main__":
    exit_with(main)
