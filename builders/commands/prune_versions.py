"""`deepseek-triton prune-versions`: free the disk of old versions; what serves and the newest stay."""

from __future__ import annotations

import argparse

from deepseek_triton.builders.commands.models import add_repository_argument, require_model
from deepseek_triton.clients.cli import add_connection_arguments

KEEP = 2  # the newest, and the one before it to go back to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("models", nargs="*", metavar="model", help="names of served models (default: all)")
    add_repository_argument(parser)
    parser.add_argument(
        "--keep",
        type=int,
        default=KEEP,
        metavar="N",
        help="newest versions that stay, at least 1 (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="tell what would be removed, and remove nothing")
    add_connection_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print what was removed as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Remove the versions, and print each with its bytes."""
    from deepseek_triton.builders.commands.serving_now import describe_server, serving_all
    from deepseek_triton.builders.repository.models.built import BuiltModel
    from deepseek_triton.builders.repository.models.inventory import describe_bytes, model_names
    from deepseek_triton.builders.repository.models.prune import removals, remove

    for name in arguments.models:
        require_model(arguments.repository, name)
    names = arguments.models or model_names(arguments.repository)
    models = [BuiltModel.read(arguments.repository, name) for name in dict.fromkeys(names)]
    now = serving_all(arguments, arguments.repository, [model.name for model in models])
    served = {name: one.loaded for name, one in now.items()}  # another's too: a version that may be used stays
    # All are found before the first is removed: an error leaves everything as it was.
    planned = [(model, one) for model in models for one in removals(model, arguments.keep, served[model.name] or ())]
    if not arguments.quiet and not arguments.json:
        print(describe_server(arguments, now))
    for model, removal in planned:
        if not arguments.dry_run:
            remove(model, removal)
        if not arguments.json:
            verb = "would remove" if arguments.dry_run else "removed"
            print(f"{verb} {removal.model}, version {removal.version}: {removal.num_bytes:,} bytes")
    total = sum(removal.num_bytes for _, removal in planned)
    if arguments.json:
        from deepseek_triton.clients.printing import json_line

        removed = [removal for _, removal in planned]
        print(json_line({"removed": removed, "bytes": total, "is_dry_run": arguments.dry_run, "served": served}))
        return 0
    verb = "would free" if arguments.dry_run else "freed"
    print(f"{verb} {total:,} bytes ({describe_bytes(total)})" if planned else "nothing to remove")
    return 0
