"""A path that names no checkpoint: what was probably meant, in one line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

MAX_LOOKED_AT = 2000  # directories and files, so that a whole disk takes no time
MAX_DEPTH = 3
MAX_NAMED = 8
WEB_PAGE = re.compile(r"https?:/+(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)")


def how_to_name(path: Path) -> str:
    """What to give instead of a path that doesn't exist."""
    if match := WEB_PAGE.match(str(path)):
        return f"a model of Hugging Face is named as {match[1]}"
    return "give a Hugging Face directory, a .gguf file or, to download a model, ORG/NAME"


def reason_for_none(directory: Path) -> str:
    """Why there is no checkpoint in a directory, and where there are some."""
    if any(directory.glob("*/config.pbtxt")) or (directory / "config.pbtxt").exists():
        return "it is what `build` has made; give what it was made from (`deepseek-triton inspect` shows that)"
    if pickles := sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pth")):
        return f"it has {pickles[0].name}, but no config.json; fetch the whole checkpoint"
    try:
        found = sorted(map(str, itertools.islice(_checkpoints_below(directory), MAX_NAMED)))
    except OSError as error:
        return f"{error.strerror}; make it readable"
    if not found:
        return "neither config.json nor a .gguf file; give a Hugging Face directory or a .gguf file"
    are = "is one in" if len(found) == 1 else "are some in"
    return f"there {are} {', '.join(found)}; give one of these"


def _checkpoints_below(directory: Path) -> Iterator[Path]:
    """The directories below that have a checkpoint in them, not far down; links are not followed."""
    level, num_left = [directory], MAX_LOOKED_AT
    for depth in range(MAX_DEPTH + 1):
        below: list[Path] = []
        for one in level:
            try:
                entries = list(itertools.islice(one.iterdir(), num_left))
            except OSError:  # it can't be read
                if depth == 0:
                    raise
                continue
            num_left -= len(entries)
            if depth and _is_checkpoint(entries):
                yield one
            else:
                below += filter(_is_own_directory, entries)
        level = below


def _is_own_directory(path: Path) -> bool:
    """Whether it is a directory itself, and not a link to one."""
    try:
        return path.is_dir() and not path.is_symlink()
    except OSError:
        return False


def _is_checkpoint(entries: list[Path]) -> bool:
    names = {path.name for path in entries}
    has_weights = any(name.endswith((".safetensors", ".bin")) for name in names)
    return ("config.json" in names and has_weights) or any(name.endswith(".gguf") for name in names)
