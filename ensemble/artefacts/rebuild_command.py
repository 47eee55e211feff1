"""The command line of a build, as a manifest keeps it: changed word by word, without knowing what the words mean."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = "--repository"


def at_repository(command: str, version_dir: Path) -> str:
    """The command with the repository in which `version_dir`, DIR/MODEL/VERSION, lies now: it may have been moved."""
    with contextlib.suppress(ValueError, IndexError):  # an open quote, or no such option
        words = shlex.split(command)
        words[words.index(REPOSITORY) + 1] = os.fspath(version_dir.resolve().parents[1])
        return shlex.join(words)
    return command


def with_options(command: str, without: Iterable[str], words: Iterable[str]) -> str:
    """The command without the options `without` and their values, and with `words` at its end."""
    dropped = set(without)
    kept: list[str] = []
    try:
        old = shlex.split(command)
    except ValueError:
        return command
    is_dropping = False
    for word in old:
        if word.startswith("--"):
            is_dropping = word.partition("=")[0] in dropped
        elif is_dropping:  # the option's value
            is_dropping = False
            continue
        if not is_dropping:
            kept.append(word)
    return shlex.join([*kept, *words])
