"""The argument that names a model of a repository on the disk, and the error for a name that is not there."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepseek_triton.builders.commands.parser import did_you_mean
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.options import BuildOptions


def add_repository_argument(parser: argparse.ArgumentParser) -> None:
    """Add --repository."""
    parser.add_argument(
        "--repository",
        type=Path,
        default=BuildOptions.repository,
        metavar="DIR",
        help="model repository (default: %(default)s)",
    )


def suggest_model(repository: Path, name: str) -> None:
    """Refuse a model that is not there while another one has nearly its name.

    Raises:
        BuildError: with the other name.
    """
    from deepseek_triton.builders.repository.check import served_models

    if repository.is_dir() and not (repository / name).is_dir():
        suggestion = did_you_mean(name, served_models(repository))
        if suggestion:
            raise BuildError(f"{repository} has no model {name!r}{suggestion}")
