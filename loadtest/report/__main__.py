"""`python -m deepseek_triton.loadtest.report RESULT.json`: write the report beside the result again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from deepseek_triton.command_parser import CommandParser
from deepseek_triton.extras import exit_with
from deepseek_triton.loadtest.report.page import write_report
from deepseek_triton.loadtest.result import ResultError, load


def main(argv: Sequence[str] | None = None) -> int:
    """Write report.html beside a result.json; returns 1 if that can't be read or written."""
    parser = CommandParser(
        prog="python -m deepseek_triton.loadtest.report", description="Write report.html beside a result.json again."
    )
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    path = parser.parse_args(argv).result
    try:
        write_report(load(path), path.with_name("report.html"))
    except (OSError, ResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path.with_name('report.html')}")
    return 0


if __name__ == "__main__":
    exit_with(main)
