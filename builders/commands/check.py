"""`deepseek-triton check`: a model repository's problems, without a server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "repository",
        type=Path,
        nargs="?",
        default=Path("model_repository"),
        help="model repository (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the problems as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print every problem; 1 if there is one."""
    from deepseek_triton.builders.repository.check import check_repository

    problems = check_repository(arguments.repository)
    if arguments.json:
        from deepseek_triton.clients.printing import json_line

        print(json_line({"repository": arguments.repository, "problems": problems}))
        return 1 if problems else 0
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{arguments.repository}: {len(problems)} problems" if problems else f"{arguments.repository}: sound")
    return 1 if problems else 0
