"""`deepseek-triton rollback`: let the model before the last promotion answer again."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from deepseek_triton.builders.commands.promote import add_server_arguments, make_control


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("name", help="name that clients ask the gateway for")
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Roll back, and print what answers now."""
    from deepseek_triton.builders.lifecycle.promotion.promote import rollback
    from deepseek_triton.clients.printing import json_line

    def say(line: str) -> None:
        if not (arguments.quiet or arguments.json):
            print(line, flush=True)

    promotion = rollback(arguments.repository, arguments.name, arguments.routes, make_control(arguments), say)
    print(json_line(asdict(promotion)) if arguments.json else f"{promotion.old} answers {promotion.name}")
    return 0
