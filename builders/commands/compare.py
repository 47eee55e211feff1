"""`deepseek-triton compare`: two load tests' results and the differences between them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("a", type=Path, help="result.json of the earlier run")
    parser.add_argument("b", type=Path, help="result.json of the later run")
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the differences; 1 for a file that isn't a result."""
    from deepseek_triton.loadtest.compare import compare, table, warnings
    from deepseek_triton.loadtest.result import ResultError, load

    try:
        a, b = load(arguments.a), load(arguments.b)
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    comparison = compare(a, b)
    if arguments.json:
        from deepseek_triton.clients.printing import json_line

        print(json_line({"warnings": warnings(a, b), "comparison": comparison}))
    else:
        print(table(a, b, comparison))
    return 0
