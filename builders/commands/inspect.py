"""`deepseek-triton inspect`: one model's versions, sizes and settings, and what serves now."""

from __future__ import annotations

import argparse

from deepseek_triton.builders.commands.models import add_repository_argument, require_model
from deepseek_triton.clients.cli import add_connection_arguments
from deepseek_triton.clients.printable import printable
from deepseek_triton.ensemble.protocol.settings import to_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("model", help="name of the served model")
    add_repository_argument(parser)
    add_connection_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what the model is, its versions and its settings."""
    from deepseek_triton.builders.commands.serving_now import describe_server, serving
    from deepseek_triton.builders.repository.models.inventory import describe_bytes, record_of

    require_model(arguments.repository, arguments.model)
    record = record_of(arguments.repository, arguments.model)
    now = serving(arguments, arguments.repository, record.name)
    served = now.versions
    if arguments.json:
        from deepseek_triton.clients.printing import json_line

        changed = [setting.name for setting in record.settings if setting.is_changed]
        print(json_line({"model": record, "bytes": record.num_bytes, "changed": changed, "served": served}))
        return 0
    print(f"{record.name} in {arguments.repository}, {describe_bytes(record.num_bytes)}")
    if record.problem:
        print(printable(f"the newest version can't be read: {record.problem}"))
    else:
        print(f"task {record.task}, target {record.target}, {record.precision}, max_seq_len {record.max_seq_len:,}")
        print(printable(f"rebuild with: {record.command}"))
    print("\nversions")
    for version in record.versions:
        marks = ["newest"] if version is record.versions[-1] else []
        marks += ["serves now"] if version.version in (served or ()) else []
        print(f"  {version.version}  {describe_bytes(version.num_bytes)}  {', '.join(marks)}".rstrip())
    if record.settings:
        print("\nsettings (* differs from the default)")
    width = max((len(setting.name) for setting in record.settings), default=0)
    for setting in record.settings:
        line = f"{'*' if setting.is_changed else ' '} {setting.name.ljust(width)}  {to_text(setting.value)}"
        print(f"{line}  (default: {to_text(setting.default)})" if setting.is_changed else line)
    for path in record.edited:
        print(f"\n{path} was edited by hand; use `deepseek-triton configure`, which a build keeps")
    print(f"\n{describe_server(arguments, {record.name: now})}")
    return 0
