"""`deepseek-triton list`: the models of a repository, and which of them serve now."""

from __future__ import annotations

import argparse

from deepseek_triton.builders.commands.models import add_repository_positional
from deepseek_triton.clients.cli import add_connection_arguments
from deepseek_triton.clients.printable import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_repository_positional(parser)
    add_connection_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print everything about every model as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each model."""
    from deepseek_triton.builders.commands.serving_now import describe_server, serving_all
    from deepseek_triton.builders.repository.models.inventory import describe_bytes, model_names, record_of

    records = [record_of(arguments.repository, name) for name in model_names(arguments.repository)]
    now = serving_all(arguments, arguments.repository, [record.name for record in records])
    served = {name: one.versions for name, one in now.items()}
    if arguments.json:
        from deepseek_triton.clients.printing import json_line

        models = [{"model": record, "bytes": record.num_bytes, "served": served[record.name]} for record in records]
        print(json_line({"repository": arguments.repository, "models": models}))
        return 0
    head = ("model", "task", "target", "precision", "versions", "size", "serves")
    rows = [
        (
            record.name,
            record.task or "?",
            record.target or "?",
            record.precision or "?",
            ",".join(str(one.version) for one in record.versions) or "-",
            describe_bytes(record.num_bytes),
            ",".join(map(str, served[record.name] or ())) or "-",
        )
        for record in records
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print(printable("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()))
    if not arguments.quiet:
        print(describe_server(arguments, now))
    return 0
