"""What lies in a model repository: each served model, its versions, their sizes and its settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.models.built import CONFIG, BuiltModel
from deepseek_triton.builders.repository.staging import size_of

ENSEMBLE = re.compile(r"^\s*platform\s*:\s*[\"']ensemble[\"']", re.MULTILINE)


@dataclass(frozen=True)
class VersionRecord:
    """One version of a model: the bytes of all its parts on the disk."""

    version: int
    num_bytes: int


@dataclass(frozen=True)
class SettingRecord:
    """One setting, and its default."""

    name: str
    value: Any
    default: Any

    @property
    def is_changed(self) -> bool:
        """Whether it differs from its default."""
        return bool(self.value != self.default)


@dataclass(frozen=True)
class ModelRecord:
    """One served model; the fields from `task` on are of its newest version, and None where that can't be read.

    edited: the configurations that somebody changed by hand. problem: why the newest version can't be read, or None.
    """

    name: str
    versions: tuple[VersionRecord, ...]
    task: str | None = None
    target: str | None = None
    precision: str | None = None
    checkpoint: str | None = None
    max_seq_len: int | None = None
    settings: tuple[SettingRecord, ...] = ()
    edited: tuple[Path, ...] = ()
    command: str | None = None
    problem: str | None = None

    @property
    def num_bytes(self) -> int:
        """Of all versions."""
        return sum(version.num_bytes for version in self.versions)


def model_names(repository: Path) -> list[str]:
    """The names of the repository's served models, those that can't be read among them.

    Raises:
        BuildError: it isn't a directory.
    """
    if not repository.is_dir():
        raise BuildError(f"{repository} is not a directory; build a model first, or name another repository")
    configs = sorted(repository.glob(f"[!.]*/{CONFIG}"))
    return [path.parent.name for path in configs if ENSEMBLE.search(path.read_text(encoding="utf-8", errors="replace"))]


def record_of(repository: Path, name: str) -> ModelRecord:
    """The record of model `name`; of one whose configurations can't be read, why.

    Raises:
        BuildError: there is no such model.
    """
    try:
        model = BuiltModel.read(repository, name)
    except BuildError as error:
        if not (repository / name / CONFIG).exists():
            raise
        return ModelRecord(name, (), problem=str(error))
    versions = tuple(VersionRecord(version, sum(map(size_of, model.part_dirs(version)))) for version in model.versions)
    try:
        manifest, defaults = model.manifest, model.defaults()
        model.require_known_parameters()
        settings = tuple(SettingRecord(key, value, defaults[key]) for key, value in model.settings().items())
    except BuildError as error:
        return ModelRecord(name, versions, edited=tuple(model.edited), problem=str(error))
    return ModelRecord(
        name=name,
        versions=versions,
        task=model.task,
        target=manifest.target,
        precision=manifest.precision,
        checkpoint=manifest.checkpoint,
        max_seq_len=manifest.max_seq_len,
        settings=settings,
        edited=tuple(model.edited),
        command=manifest.command,
    )


def describe_bytes(num_bytes: int) -> str:
    """ "531.2 MB", in powers of 1000 as disks are sold."""
    size, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{num_bytes} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
