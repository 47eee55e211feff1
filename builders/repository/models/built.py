"""A built model as it lies in a repository: its parts' configurations, its versions, its newest manifest.

A directory and a name enter; a frozen record leaves. It changes nothing, and says which configurations were edited.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.check_scoring import is_scoring
from deepseek_triton.builders.repository.models.config_text import is_edited
from deepseek_triton.builders.repository.models.settings import places
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.repository.outdated import outdated_models
from deepseek_triton.builders.repository.pbtxt import parse_text
from deepseek_triton.builders.targets import target_named
from deepseek_triton.builders.targets.artefacts.target import Target
from deepseek_triton.ensemble.artefacts.manifest import Manifest, ManifestError
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.protocol.pipelines import BESIDE_SUFFIXES, ENGINE_SUFFIX, model_name
from deepseek_triton.ensemble.protocol.settings import SettingsError

CONFIG = "config.pbtxt"


@dataclass(frozen=True)
class BuiltModel:
    """One served model. texts: part's name → its config.pbtxt; versions: of all parts together, ascending."""

    repository: Path
    name: str
    texts: Mapping[str, str]
    versions: tuple[int, ...]

    @classmethod
    def read(cls, repository: Path, name: str) -> BuiltModel:
        """Read model `name`.

        Raises:
            BuildError: there is no such model, or a configuration can't be read.
        """
        ensemble = _read(repository, name)
        config = parse_text(ensemble, repository / name / CONFIG)
        if config.platform != "ensemble":
            raise BuildError(f"{name} is a part of a model: name the model that clients ask for")
        parts = [step.model_name for step in config.ensemble_scheduling.step]
        beside = (model_name(name, suffix) for suffix in BESIDE_SUFFIXES)
        parts += [part for part in beside if (repository / part / CONFIG).exists()]
        texts = {name: ensemble, **{part: _read(repository, part) for part in parts}}
        found = {int(path.name) for part in texts for path in (repository / part).iterdir() if is_version(path)}
        return cls(repository, name, texts, tuple(sorted(found)))

    @cached_property
    def configs(self) -> dict[str, ModelConfig]:
        """The parsed configurations by the parts' names."""
        return {part: parse_text(text, self.repository / part / CONFIG) for part, text in self.texts.items()}

    @property
    def edited(self) -> list[Path]:
        """The configurations that somebody changed by hand."""
        return [self.repository / part / CONFIG for part, text in self.texts.items() if is_edited(text)]

    @property
    def task(self) -> str:
        """ "generate" or "score"."""
        return "score" if is_scoring(self.configs[self.engine]) else "generate"

    @property
    def engine(self) -> str:
        """The name of the part that computes."""
        return model_name(self.name, ENGINE_SUFFIX)

    def version_dir(self, version: int) -> Path:
        """The engine's directory of a version."""
        return self.repository / self.engine / str(version)

    def part_dirs(self, version: int) -> list[Path]:
        """The directories of a version that are there, the ensemble's first."""
        paths = (self.repository / part / str(version) for part in self.texts)
        return [path for path in paths if path.is_dir()]

    @cached_property
    def manifest(self) -> Manifest:
        """Of the newest version.

        Raises:
            BuildError: it isn't there, or can't be read.
        """
        if not self.versions:
            raise BuildError(f"{self.repository / self.name} has no version: build the model first")
        try:
            return Manifest.load(self.version_dir(self.versions[-1]))
        except ManifestError as error:
            raise BuildError(str(error)) from error

    @property
    def target(self) -> Target:
        """What the newest version was built for.

        Raises:
            BuildError: as `manifest`, or there is no such target.
        """
        return target_named(self.manifest.target)

    @property
    def spec(self) -> ModelSpec:
        """The newest version's dimensions."""
        spec: ModelSpec = from_plain(ModelSpec, self.manifest.spec)
        return spec

    def settings(self) -> dict[str, Any]:
        """Every setting's value, by name.

        Raises:
            BuildError: as `target`; a value isn't one that the setting can have.
        """
        values, faults = self.read_settings()
        for name, fault in faults.items():
            raise self._fault(fault, f"--{name.replace('_', '-')} …, or --reset-settings")
        return values

    def read_settings(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The values that can be read, and what is wrong with each of the others, both by the setting's name.

        Raises:
            BuildError: as `target`.
        """
        values: dict[str, Any] = {}
        faults: dict[str, str] = {}
        for name, place in places(self.target, self.task).items():
            try:
                values[name] = place.read(self.configs, self.name)
            except SettingsError as error:
                faults[name] = str(error)
        return values, faults

    def require_known_parameters(self) -> None:
        """Refuse a parameter of the engine that is no setting: with it the engine can't be loaded.

        Raises:
            BuildError: there is one.
        """
        for name in self.unknown_parameters():
            raise self._fault(f"there is no setting {name!r}", "--reset-settings, which removes it")

    def _fault(self, fault: str, options: str) -> BuildError:
        path = self.repository / self.engine / CONFIG
        return BuildError(f"{path}: {fault}; correct it with: deepseek-triton configure {self.name} {options}")

    def unknown_parameters(self) -> list[str]:
        """The names among the engine's parameters that are no settings; upper-case ones are Triton's own."""
        known = places(self.target, self.task)
        return sorted(name for name in self.configs[self.engine].parameters if name not in known and not name.isupper())

    def defaults(self) -> dict[str, Any]:
        """What each setting would be if nobody had set it."""
        table = places(self.target, self.task)
        common = {name: place.setting.default for name, place in table.items()}
        if self.task == "score":
            return common
        manifest = self.manifest
        values, _ = self.read_settings()
        own: dict[str, Any] = {
            name: values[name] for name in ("tensor_parallel_size", "expert_parallel_size") if name in values
        }
        options = BuildOptions(
            Path(manifest.checkpoint), self.name, target=manifest.target, precision=manifest.precision, settings=own
        )
        return {**common, **self.target.default_settings(options, self.spec, manifest.max_seq_len)}

    def changed_settings(self) -> dict[str, Any]:
        """Those that differ from their defaults."""
        defaults = self.defaults()
        return {name: value for name, value in self.settings().items() if value != defaults[name]}


def edited_configs(repository: Path) -> list[Path]:
    """Every config.pbtxt in the repository that somebody changed by hand; models that must be rebuilt are left out."""
    outdated = {part for _, parts in outdated_models(repository) for part in parts}
    paths = [path for path in sorted(repository.glob(f"[!.]*/{CONFIG}")) if path.parent.name not in outdated]
    return [path for path in paths if is_edited(path.read_text(encoding="utf-8", errors="replace"))]


def is_version(path: Path) -> bool:
    """Whether Triton takes the path for a version of a model."""
    return path.name.isdecimal() and path.is_dir()


def from_plain(kind: Any, values: Any) -> Any:
    """What `dataclasses.asdict` and JSON made of an object of dataclass `kind`, as the object again."""
    if isinstance(kind, types.UnionType):  # X | None
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    if values is None:
        return None
    if is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        known = {field.name for field in fields(kind)}
        return kind(**{name: from_plain(hints[name], value) for name, value in values.items() if name in known})
    return tuple(values) if isinstance(values, list) else values


def _read(repository: Path, name: str) -> str:
    path = repository / name / CONFIG
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        advice = "build the model first, or name another --repository"
        if path.parent.is_dir():
            advice = "write it anew with: deepseek-triton configure MODEL --reset-settings"
        raise BuildError(f"{path}: {reason}; {advice}") from error
