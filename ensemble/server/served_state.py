"""What a model repository holds when a server starts, so that a restart after a crash serves the same again.

A repository's path enters; a directory that Triton can serve leaves, with the configurations as they were and links to
the versions that were there. It knows Triton's layout of a repository, not what the models are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class ModelState:
    """One model: the text of its configuration, and its versions in ascending order."""

    config: str
    versions: tuple[int, ...]


@dataclass(frozen=True)
class ServedState:
    """The models of a repository by name."""

    repository: Path
    models: Mapping[str, ModelState]

    @classmethod
    def of(cls, repository: Path) -> ServedState:
        """Read what is there now."""
        return cls(repository, {path.parent.name: _read(path) for path in sorted(repository.glob(f"[!.]*/{CONFIG}"))})

    def differences(self) -> list[str]:
        """What a server that starts now would serve otherwise, one line a model."""
        now = ServedState.of(self.repository).models
        lines = [f"{name} is new" for name in now if name not in self.models]
        for name, before in self.models.items():
            after = now.get(name)
            if after is None:
                lines.append(f"{name} has been removed")
            elif after.versions != before.versions:
                lines.append(f"{name} had versions {_words(before.versions)}, now {_words(after.versions)}")
            elif after.config != before.config:
                lines.append(f"{name}/{CONFIG} has changed")
        return lines

    def is_whole(self) -> bool:
        """Whether the newest version of each model is still there."""
        newest = (
            self.repository / name / str(max(model.versions)) for name, model in self.models.items() if model.versions
        )
        return all(path.is_dir() for path in newest)

    def restore(self, directory: Path) -> Path:
        """Make a repository in `directory` as it was; returns its path. Versions are links to what is still there."""
        copy = directory / self.repository.resolve().name
        for name, model in self.models.items():
            (copy / name).mkdir(parents=True, exist_ok=True)
            (copy / name / CONFIG).write_text(model.config, encoding="utf-8")
            for version in model.versions:
                source, link = (self.repository / name / str(version)).resolve(), copy / name / str(version)
                if source.is_dir() and not link.is_symlink():
                    link.symlink_to(source, target_is_directory=True)
        return copy


def _read(config: Path) -> ModelState:
    versions = sorted(int(path.name) for path in config.parent.iterdir() if path.name.isdecimal() and path.is_dir())
    return ModelState(config.read_text(encoding="utf-8"), tuple(versions))


def _words(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions)) or "none"
