"""The interface between a build and its target, and the data that passes through it."""

from __future__ import annotations

import importlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets.artefacts.memory import BYTES_OF_WEIGHT, ServingMemory, gpu_memory
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.part import Part, Split
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError
from deepseek_triton.ensemble.protocol.target_settings import TargetSettings
from deepseek_triton.ensemble.scoring.settings import ScoringSettings

if TYPE_CHECKING:
    from deepseek_triton.builders.checkpoint.reader import Checkpoint
    from deepseek_triton.builders.fp8.journal import BuildJournal
    from deepseek_triton.builders.fp8.recipe import Recipe
    from deepseek_triton.builders.repository.options import BuildOptions, Report
    from deepseek_triton.ensemble.decoder.spec import ModelSpec

MIB = 2**20


@dataclass(frozen=True)
class BuildJob:
    """One engine to write: max_seq_len in tokens, `directory` is the engine's version directory.

    end_ids: the tokens that end a text; an engine that scores needs none. say: called with a line for the user on what
    was written.
    """

    checkpoint: Checkpoint
    options: BuildOptions
    max_seq_len: int
    directory: Path
    report: Report
    end_ids: tuple[int, ...] = ()
    say: Callable[[str], None] = lambda line: None

    @property
    def spec(self) -> ModelSpec:
        """The model's dimensions."""
        return self.checkpoint.spec

    def journal(self) -> BuildJournal:
        """What is kept of an FP8 build, should it be killed; for recipes that need a calibration."""
        from deepseek_triton.builders.fp8.journal import BuildJournal, journal_directory, subject_of
        from deepseek_triton.builders.fp8.rounding.arrays import best_arrays

        subject = {
            **subject_of(self.checkpoint.path, best_arrays().name),
            "adapter": dict(self.checkpoint.adapter),
            "has_indexer": self.spec.indexer is not None,
        }
        return BuildJournal(journal_directory(self.options.repository, self.options.name), subject)


@dataclass(frozen=True)
class Artefacts:
    """What a target wrote, for the manifest, whose fields these are.

    digests: the SHA-256 of those files that were hashed while they were written.
    """

    files: tuple[Path, ...]
    recipe: Recipe | None = None
    shapes: dict[str, list[int | str]] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    requires: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


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
    is_compiled: whether it takes the options compute_capability, timing_cache and
    builder_optimization_level. scores_with_plan: whether Triton's
    own tensorrt backend runs its scoring engines, and not a Python model. own_settings: how its settings differ from
    the common ones; its runner has the same. compiled_settings: those whose highest value is fixed at the build.
    packages: those beside the common ones whose versions its artefacts depend on. parts: the kinds of layers' parts
    that it builds. quantized_parts: those that it builds in FP8 or in blocks of integers. why_not: why it
    builds no others, for its message. indexed_tasks: those for which it computes an indexer, which texts of more tokens
    than it chooses need. beside: the suffixes of the models that it needs beside the steps of the
    ensemble.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    tasks: ClassVar[tuple[str, ...]] = ("generate",)
    is_compiled: ClassVar[bool] = False
    scores_with_plan: ClassVar[bool] = False
    parts: ClassVar[tuple[type[Part], ...]] = (GroupedQueryAttention, DenseMlp)
    quantized_parts: ClassVar[tuple[type[Part], ...]] = (GroupedQueryAttention, DenseMlp)
    why_not: ClassVar[str] = ""
    indexed_tasks: ClassVar[tuple[str, ...]] = ()
    own_settings: ClassVar[TargetSettings] = TargetSettings()
    compiled_settings: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def cache_budget(self) -> CacheBudget:
        """What bounds the default max_seq_len."""

    def whole_sequences(self, settings: Mapping[str, Any]) -> int:
        """The number of whole sequences whose caches must fit; settings: max_num_seqs and what else is set."""
        return int(settings["max_num_seqs"])

    @abstractmethod
    def write(self, job: BuildJob, settings: EngineSettings) -> Artefacts:
        """Write an engine that generates text.

        Raises:
            BuildError: a package is missing, or calibration or compilation failed.
        """

    def write_beside(self, job: BuildJob, settings: EngineSettings, directories: Mapping[str, Path]) -> None:
        """Write the models in `beside`; directories: suffix → the model's version directory. Called after `write`."""
        return

    def write_scoring(self, job: BuildJob, prefix_ids: Sequence[int]) -> Artefacts:
        """Write an engine that scores texts in one pass without a cache; for targets whose tasks have "score".

        prefix_ids: the tokens that the prompts of all texts begin with.

        Raises:
            BuildError: as `write`.
        """
        raise BuildError(f"target {self.name} has no task score")

    def bound_by_indexer(self, spec: ModelSpec, task: str) -> int | None:
        """The longest text in tokens where the model has an indexer and it doesn't: one that is attended to whole."""
        return None if spec.indexer is None or task in self.indexed_tasks else spec.indexer.topk

    def takes_blocks(self, options: BuildOptions, spec: ModelSpec) -> bool:
        """Whether it keeps the codes of an FP8 checkpoint whose scales are for blocks; else they are rounded anew."""
        return False

    def check_parts(self, options: BuildOptions, spec: ModelSpec) -> None:
        """Check that it builds every part of the model's layers in the precision asked for.

        Raises:
            BuildError: there is one that it doesn't build.
        """
        is_float = options.precision in ("fp32", "fp16", "bf16")
        built = self.parts if is_float else self.quantized_parts
        what = f"target {self.name}" if is_float else f"target {self.name} in {options.precision}"
        for layer in range(spec.num_layers):
            for part in spec.parts(layer):
                if type(part) in built:
                    continue
                raise BuildError(
                    f"{what} doesn't build the {type(part).NOUN} of architecture {spec.architecture}"
                    f"{self.why_not}; use --target cuda or onnx"
                )

    def settings(self, options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> EngineSettings:
        """The settings that `options` ask for, and this target's defaults for the others.

        Raises:
            BuildError: a setting doesn't fit the model or max_seq_len.
        """
        settings = EngineSettings(**{**self.default_settings(options, spec, max_seq_len), **options.settings})
        try:
            self.own_settings.check_max_num_batched_tokens(settings, max_seq_len)
        except SettingsError as error:
            raise BuildError(str(error)) from error
        return settings

    def default_settings(self, options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> dict[str, Any]:
        """This target's settings for such a model."""
        defaults = self.own_settings.default_values()
        if self.own_settings.packs_prompts:
            return defaults
        return {**defaults, "max_num_batched_tokens": min(defaults["max_num_batched_tokens"], max_seq_len)}

    def parameters(self, settings: EngineSettings) -> dict[str, str]:
        """The `parameters` of config.pbtxt: those of `settings` that this target has."""
        known = self.own_settings.table()
        return {name: text for name, text in settings.to_parameters().items() if name in known}

    def scoring_parameters(self, given: Mapping[str, Any], max_pass_tokens: int | None) -> dict[str, str]:
        """The `parameters` of a scoring engine that a Python model runs: the settings that this target has."""
        table = self.own_settings.scoring_table()
        values = {name: declared.default for name, declared in table.items()} | dict(given)
        if max_pass_tokens is not None:
            values["max_pass_tokens"] = max_pass_tokens
        texts = ScoringSettings(**values).to_parameters()
        return {name: text for name, text in texts.items() if name in table}

    def check_settings(self, settings: EngineSettings) -> None:
        """Check that this target has every setting that isn't at its default.

        Raises:
            SettingsError: names the setting that it doesn't have, and the targets that do.
        """
        from deepseek_triton.builders.targets import all_targets

        def others(setting: str) -> str:
            names = [target.name for target in all_targets() if setting in target.own_settings.own]
            return f", or build for target {' or '.join(names)}" if names else ""

        self.own_settings.check(settings, self.name, others)

    def cache_bytes(self, options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> int:
        """Bytes that one sequence of `max_seq_len` tokens takes in the caches of one device."""
        return self.sequence_bytes(spec, options.precision, max_seq_len, split_of(options.settings))

    def sequence_bytes(self, spec: ModelSpec, precision: str, max_seq_len: int, split: Split) -> int:
        """As `cache_bytes`, of a model that is split so over several devices."""
        return spec.cache_elements() * max_seq_len * (2 if precision in ("fp16", "bf16", "fp8") else 4)

    def weight_bytes(self, spec: ModelSpec, precision: str) -> int:
        """Bytes of the weights in memory, nearly."""
        return int(spec.num_parameters() * BYTES_OF_WEIGHT[precision])

    def device_weight_bytes(self, spec: ModelSpec, precision: str, split: Split) -> int:
        """As `weight_bytes`, of one device of a model that is split."""
        return self.weight_bytes(spec, precision) // split.tensor_size

    def step_bytes(self, spec: ModelSpec, max_seq_len: int, settings: Mapping[str, Any]) -> int:
        """Bytes that a step needs beside weights and caches, nearly; `settings` are all that an engine has."""
        return int(4 * spec.vocab_size * settings["max_num_seqs"])  # logits

    def memory(self, named: str | None) -> ServingMemory:
        """The memory of one device that serves; `named` as in BuildOptions.

        Raises:
            BuildError: `named` isn't the name of one, nor a number of GiB.
        """
        return gpu_memory(named)

    def disk_bytes(self, options: BuildOptions, spec: ModelSpec) -> int:
        """Bytes that the build takes on the disk at most."""
        # An FP8 build may keep any layer in 16 bits.
        return int(spec.num_parameters() * max(BYTES_OF_WEIGHT[options.precision], 2.0 * (options.precision == "fp8")))

    def compile_seconds(self, spec: ModelSpec) -> float:
        """How long this machine compiles what is written, nearly; 0: nothing is compiled, or it was never measured."""
        return 0.0

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
            self.check_settings(settings)
        except SettingsError as error:
            yield str(error)
        try:
            self.own_settings.check_max_num_batched_tokens(settings, manifest.max_seq_len)
        except SettingsError as error:
            yield str(error)

    def check_scoring(self, manifest: Manifest) -> Iterator[str]:
        """What keeps the scoring engine of `manifest` from running, one line each."""
        yield from ()


def split_of(settings: Mapping[str, Any]) -> Split:
    """How the settings split a model; those that aren't there leave it whole."""
    return Split(settings.get("tensor_parallel_size", 1), settings.get("expert_parallel_size", 1))
