"""`deepseek-triton check`: a model repository's problems, without a server."""

from __future__ import annotations

import argparse
import sys

from deepseek_triton.builders.commands.models import add_repository_positional


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_repository_positional(parser)
    parser.add_argument("--deep", action="store_true", help="read weight files whole and compare their checksums")
    parser.add_argument("--json", action="store_true", help="print the problems as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print every problem; 1 if there is one."""
    from deepseek_triton.builders.repository.check import check_files, check_repository, unbuilt_models
    from deepseek_triton.builders.repository.models.built import edited_configs
    from deepseek_triton.clients.printable import printable

    problems = check_repository(arguments.repository)
    if arguments.deep:
        problems = [*problems, *check_files(arguments.repository)]
    for path in edited_configs(arguments.repository):
        print(f"{path} was edited by hand; use `deepseek-triton configure`, which a build keeps", file=sys.stderr)
    if arguments.json:
        from deepseek_triton.clients.printing import json_line

        print(json_line({"repository": arguments.repository, "problems": problems}))
        return 1 if problems else 0
    for problem in problems:
        print(printable(str(problem)), file=sys.stderr)
    if not problems and (unbuilt := unbuilt_models(arguments.repository)):
        names = ", ".join(unbuilt)
        print(f"not built: {names}; `deepseek-triton serve` leaves them out, tritonserver by itself ends over them")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    print(f"{printable(str(arguments.repository))}: {count if problems else 'sound'}")
    return 1 if problems else 0
