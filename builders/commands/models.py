"""The arguments that name a repository on the disk, and the error for a model that is not there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.clients.nearest import name_hint


def path(text: str) -> Path:
    """A path for argparse, which must not be empty: `$UNSET` would mean this directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


_REPOSITORY: dict[str, Any] = {
    "type": path,
    "default": Path("model_repository"),
    "help": "model repository (default: %(default)s)",
}


def add_repository_argument(parser: argparse.ArgumentParser) -> None:
    """Add --repository, for a command that names a model."""
    parser.add_argument("--repository", metavar="DIR", **_REPOSITORY)


def add_repository_positional(parser: argparse.ArgumentParser) -> None:
    """Add the repository as a word that may be left out, for a command about all of its models."""
    parser.add_argument("repository", nargs="?", **_REPOSITORY)


def add_memory_argument(parser: argparse.ArgumentParser) -> None:
    """Add --memory."""
    parser.add_argument(
        "--memory",
        metavar="GPU|GIB",
        help="memory of what will serve: a GPU's name as h100, or GiB (default: this machine's)",
    )


def require_model(repository: Path, name: str) -> None:
    """Refuse a model that is not in the repository.

    Raises:
        BuildError: with the nearest name, or the names that there are.
    """
    from deepseek_triton.builders.repository.models.inventory import model_names
    from deepseek_triton.ensemble.protocol.pipelines import PART_SUFFIXES

    names = model_names(repository)
    if name in names:
        return
    base = next((name.removesuffix(f"-{part}") for part in PART_SUFFIXES if name.endswith(f"-{part}")), name)
    if base in names and base != name:
        raise BuildError(f"{name} is a part of {base}: name {base}")
    # A model whose config.pbtxt is gone or can't be read is one all the same: `configure --reset-settings` mends it.
    if (repository / name).is_dir() and (repository / f"{name}-engine").is_dir():
        return
    hint = name_hint(name, names) if names else "; build one first, or name another --repository"
    raise BuildError(f"{repository} has no model {name!r}{hint}")
