"""Hugging Face's cache on this machine: `models--ORG--NAME/snapshots/COMMIT` holds links to `blobs`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

PREFIX = "models--"
# ORG/NAME, or ORG/NAME/FILE.gguf.
MODEL_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(.+\.gguf))?")


@dataclass(frozen=True)
class Snapshot:
    """One model's files at one commit. cache: the model's directory in the cache."""

    cache: Path
    commit: str

    @classmethod
    def of(cls, directory: Path) -> Snapshot | None:
        """The snapshot that `directory` is; None: it is no part of a cache."""
        path = directory.absolute()
        if path.parent.name != "snapshots" or not path.parent.parent.name.startswith(PREFIX):
            return None
        return cls(path.parent.parent, path.name)

    @property
    def model_id(self) -> str:
        """As on the Hub: ORG/NAME."""
        return self.cache.name.removeprefix(PREFIX).replace("--", "/", 1)

    def has_interrupted_download(self) -> bool:
        """Does the cache hold the beginning of a file?"""
        return any(self.cache.glob("blobs/*.incomplete"))

    def download_command(self) -> str:
        """What completes it."""
        return shlex.join(["hf", "download", self.model_id, "--revision", self.commit])


def snapshot_in(directory: Path) -> Path:
    """The snapshot that `directory` names where it is a model's directory in the cache, else `directory` itself."""
    if not directory.name.startswith(PREFIX) or not (directory / "snapshots").is_dir():
        return directory
    main = directory / "refs" / "main"
    if main.is_file():
        return directory / "snapshots" / main.read_text(encoding="utf-8").strip()
    snapshots = sorted((directory / "snapshots").iterdir())
    return snapshots[0] if len(snapshots) == 1 else directory


def model_name(path: Path) -> str:
    """What a checkpoint is called: its file or directory, or for a snapshot of the cache ORG/NAME."""
    snapshot = Snapshot.of(path)
    return path.absolute().name if snapshot is None else snapshot.model_id


def names_model(source: Path) -> bool:
    """Is `source` no path here, but the name of a model on Hugging Face, or of a file of it?"""
    return not (source.exists() or source.is_symlink()) and MODEL_ID.fullmatch(str(source)) is not None
