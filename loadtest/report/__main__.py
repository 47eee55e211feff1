"""`python -m deepseek_triton.loadtest.report result.json`: the report again, beside the result."""

from __future__ import annotations

import sys
from pathlib import Path

from deepseek_triton.loadtest.report.page import write_report
from deepseek_triton.loadtest.result import ResultError, load

USAGE = 2


def main(arguments: list[str]) -> int:
    """Write report.html beside the result that is named."""
    if len(arguments) != 1:
        print("usage: python -m deepseek_triton.loadtest.report RESULT.json", file=sys.stderr)
        return USAGE
    path = Path(arguments[0])
    try:
        write_report(load(path), path.with_name("report.html"))
    except (OSError, ResultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path.with_name('report.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
