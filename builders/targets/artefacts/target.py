"""The interface between a build and its target, and the data that passes through it."""

from __future__ import annotations

import importlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError, target_defaults

if TYPE_CHECKING:
    from deepseek_triton.builders.checkpoint.reader import Checkpoint
    from deepseek_triton.builders.fp8.recipe import Recipe
    from deepseek_triton.builders.repository.options import BuildOptions, Report
    from deepseek_triton.ensemble.decoder.spec import ModelSpec

MIB = 2**20


@dataclass(frozen=True)
class BuildJob:
    """One engine to write: max_seq_len in tokens, `directory` is the engine's version directory."""

    checkpoint: Checkpoint
    options: BuildOptions
    max_seq_len: int
    directory: Path
    report: Report

    @property
    def spec(self) -> ModelSpec:
        """The model's dimensions."""
        return self.checkpoint.spec


@dataclass(frozen=True)
class Artefacts:
    """What a target wrote, for the manifest, whose fields these are."""

    files: tuple[Path, ...]
    recipe: Recipe | None = None
    shapes: dict[str, list[int | str]] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheBudget:
    """What bounds max_seq_len where the build chooses it: the KV caches of `num_seqs` whole sequences must fit.

    num_bytes: that they may take on each device. what: what these bytes are a part of, for the user. max_tokens: a
    bound on max_seq_len itself, where a longer one makes every step slower.
    """

    num_bytes: int
    num_seqs: int
    what: str
    max_tokens: int | None = None


class Target(ABC):
    """What a build asks of its target.

    name: as in `--target`. precisions: those that it has; the first is the default. tasks: "generate", "score" or both.
    is_compiled: whether it takes the options compute_capability and timing_cache. scores_with_plan: whether Triton's
    own tensorrt backend runs its scoring engines, and not a Python model.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    tasks: ClassVar[tuple[str, ...]] = ("generate",)
    is_compiled: ClassVar[bool] = False
    scores_with_plan: ClassVar[bool] = False

    @abstractmethod
    def cache_budget(self) -> CacheBudget:
        """What bounds the default max_seq_len."""

    @abstractmethod
    def write(self, job: BuildJob, settings: EngineSettings) -> Artefacts:
        """Write an engine that generates text.

        Raises:
            BuildError: a package is missing, or calibration or compilation failed.
        """

    def write_scoring(self, job: BuildJob, prefix_ids: Sequence[int]) -> Artefacts:
        """Write an engine that scores texts in one pass without a cache; for targets whose tasks have "score".

        prefix_ids: the tokens that the prompts of all texts begin with.

        Raises:
            BuildError: as `write`.
        """
        raise BuildError(f"target {self.name} has no task score")

    def settings(self, options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> EngineSettings:
        """The settings that `options` ask for, and this target's defaults for the others.

        Raises:
            BuildError: a setting doesn't fit the model or max_seq_len.
        """
        settings = EngineSettings(**{**self.default_settings(options, spec, max_seq_len), **options.settings})
        try:
            settings.check_max_num_batched_tokens(self.name, max_seq_len)
        except SettingsError as error:
            raise BuildError(str(error)) from error
        return settings

    def default_settings(self, options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> dict[str, Any]:
        """This target's settings for such a model."""
        defaults = target_defaults(self.name)
        return {**defaults, "max_num_batched_tokens": min(defaults["max_num_batched_tokens"], max_seq_len)}

    def cache_bytes(self, options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> int:
        """Bytes that one sequence of `max_seq_len` tokens takes in the caches of one device."""
        return spec.cache_elements() * max_seq_len * (4 if options.precision == "fp32" else 2)

    def disk_bytes(self, options: BuildOptions, spec: ModelSpec) -> int:
        """Bytes that the build takes on the disk at most."""
        return spec.num_parameters() * (4 if options.precision == "fp32" else 2)

    def require_packages(self) -> None:
        """Import what writing needs, so that a missing package is reported before anything else.

        Raises:
            ModuleNotFoundError: a package is missing.
        """
        importlib.import_module("deepseek_triton.builders.targets.artefacts.graph")

    def preflight(self, options: BuildOptions, spec: ModelSpec, directory: Path) -> None:
        """Find out before the minutes of quantising whether the build can succeed.

        Raises:
            BuildError: a package, a GPU or room on the disk is missing.
        """
        needed, free = self.disk_bytes(options, spec), shutil.disk_usage(directory).free
        if free < needed:
            raise BuildError(f"{options.repository}: {needed // MIB} MiB needed, {free // MIB} MiB free; make room")

    def check(self, manifest: Manifest, settings: EngineSettings) -> Iterator[str]:
        """What keeps the engine of `manifest` from running with `settings`, one line each."""
        try:
            settings.check_target(self.name)
        except SettingsError as error:
            yield str(error)
        try:
            settings.check_max_num_batched_tokens(self.name, manifest.max_seq_len)
        except SettingsError as error:
            yield str(error)
