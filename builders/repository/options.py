"""The options of a build: checked once, and written again as the command line that repeats the build."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.files.hub_cache import names_model
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.recipe import recipe_named
from deepseek_triton.builders.scoring.options import ScoringOptions
from deepseek_triton.builders.targets import DEFAULT_TARGET, all_targets, target_named
from deepseek_triton.ensemble.protocol.pipelines import PART_SUFFIXES
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError, to_text
from deepseek_triton.ensemble.protocol.text_settings import TextSettings
from deepseek_triton.ensemble.scoring.settings import ScoringSettings

TASKS = ("generate", "score")
OPTIMIZATION_LEVELS = range(6)  # TensorRT's
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MAX_NAME_LEN = 128  # characters: with a part's or a temporary directory's affixes, a file name has at most 255

# Called with the name of what is done now, and its progress and total in units of its own (bytes for "weights").
Report = Callable[[str, int, int], None]


def precisions() -> tuple[str, ...]:
    """The precisions of all targets together."""
    return tuple(dict.fromkeys(precision for target in all_targets() for precision in target.precisions))


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    checkpoint: a path, or ORG/NAME on Hugging Face; revision: there, None: `main`.
    adapter: a directory with a LoRA adapter that is merged into the checkpoint's weights, or ORG/NAME; None: none.
    task: "generate" makes the ensemble that streams text; "score" the one that chooses among labels in one pass without
        a cache; scoring: for it alone.
    max_seq_len: tokens in a sequence, prompt and answer; None: the model's own limit, as far as its caches fit.
    settings: of the engine, by their names in EngineSettings; what isn't there is kept from the model's last build, or
        has its target's default. instances: of the models around it, by their names in TextSettings. reset_settings:
        keep nothing from the last build.
    infer: also build NAME-infer, which answers KServe's `infer` with one response.
    recipe, keep: for fp8, a name in `builders.fp8.recipe.RECIPES` and patterns of modules that are not quantised.
    budget: for fp8 without a recipe, the minutes within which the best that is chosen should end, compiling included.
    calibration_text: for fp8, a text file; None: the built-in set and text of the model's own. ranges: a file of
        activation ranges, read where it exists, else written. compute_capability: of the GPU that will serve, as
        "8.9", for TensorRT; None: this machine's. timing_cache: TensorRT's, kept between builds.
    builder_optimization_level: TensorRT's, 0 to 5; None: its own default, 3.

    memory: of what will serve, a GPU's name as "h100" or GiB; None: this machine's.

    Raises:
        BuildError: an option is out of its range, or the target or task doesn't have it.
    """

    checkpoint: Path
    name: str
    repository: Path = Path("model_repository")
    target: str = DEFAULT_TARGET
    task: str = "generate"
    precision: str = "fp32"
    max_seq_len: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    infer: bool = False
    instances: Mapping[str, int] = field(default_factory=dict)
    reset_settings: bool = False
    recipe: str | None = None
    budget: float = 15.0
    keep: tuple[str, ...] = ()
    calibration_text: Path | None = None
    ranges: Path | None = None
    compute_capability: str | None = None
    timing_cache: Path | None = None
    builder_optimization_level: int | None = None
    adapter: Path | None = None
    revision: str | None = None
    memory: str | None = None
    scoring: ScoringOptions = field(default_factory=ScoringOptions)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise BuildError(f"name is {self.name!r}; use letters, digits, '.', '_' and '-', the first not a sign")
        if len(self.name) > MAX_NAME_LEN:
            raise BuildError(f"name has {len(self.name)} characters, must have at most {MAX_NAME_LEN}")
        if suffix := next((suffix for suffix in PART_SUFFIXES if self.name.endswith(f"-{suffix}")), None):
            raise BuildError(f"name is {self.name!r}; a model's parts end in -{suffix}, choose another name")
        target = target_named(self.target)
        self._check_task()
        if self.precision not in precisions():
            raise BuildError(f"precision is {self.precision!r}; supported: {', '.join(precisions())}")
        if self.precision not in target.precisions:
            choices = ", ".join(target.precisions)
            raise BuildError(f"precision is {self.precision!r}; target {self.target} has {choices}")
        try:
            target.check_settings(EngineSettings(**self.settings))
            TextSettings(**self.instances)
        except SettingsError as error:
            raise BuildError(str(error)) from error
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise BuildError(f"max_seq_len is {self.max_seq_len}, must be at least 2")
        if self.precision != "fp8":
            for name in ("recipe", "keep", "calibration_text", "ranges"):
                if getattr(self, name):
                    raise BuildError(f"{name} is for precision fp8, this is {self.precision}")
        elif self.recipe is not None and not recipe_named(self.recipe).needs_calibration:
            for name in ("calibration_text", "ranges"):
                if getattr(self, name):
                    raise BuildError(f"recipe {self.recipe} needs no calibration; leave out {_option(name)}")
        target.memory(self.memory)
        if not self.budget > 0:
            raise BuildError(f"budget is {self.budget}, must be positive")
        if self.builder_optimization_level not in (None, *OPTIMIZATION_LEVELS):
            raise BuildError(f"builder_optimization_level is {self.builder_optimization_level}, must be 0 to 5")
        if not target.is_compiled:
            for name in ("compute_capability", "timing_cache", "builder_optimization_level"):
                if getattr(self, name) is not None:
                    raise BuildError(f"{name} is for TensorRT, the target is {self.target}")

    def _check_task(self) -> None:
        if self.task not in TASKS:
            raise BuildError(f"task is {self.task!r}; supported: {', '.join(TASKS)}")
        if self.task not in target_named(self.target).tasks:
            others = " or ".join(target.name for target in all_targets() if self.task in target.tasks)
            raise BuildError(f"target is {self.target!r}, which task {self.task} doesn't have; use target {others}")
        if self.task != "score":
            if "scorer_instances" in self.instances or self.scoring != ScoringOptions():
                raise BuildError(f"scoring options are for task score, this is {self.task}")
            return
        if self.infer:
            raise BuildError("--infer is for task generate: a scoring model answers `infer` by itself; leave it out")
        known = target_named(self.target).own_settings.scoring_table()
        for name in self.settings:
            if name not in ScoringSettings.table():
                raise BuildError(f"{_option(name)} is for task generate: a scoring model keeps no cache; leave it out")
            if name not in known:
                raise BuildError(f"{_option(name)} is for scoring on a CPU, the target is {self.target}; leave it out")

    def command(self) -> str:
        """The command line that builds this again, in whatever directory it is run."""
        words = ["deepseek-triton", "build", _word(self.checkpoint), "--name", self.name, "--target", self.target]
        words += ["--precision", self.precision, "--repository", _word(self.repository)]
        optional = ("revision", "adapter", "max_seq_len", "calibration_text", "ranges", "compute_capability", "memory")
        for name in (*optional, "timing_cache", "builder_optimization_level"):
            if getattr(self, name) is not None:
                words += [_option(name), _word(getattr(self, name))]
        if self.task != "generate":
            words += ["--task", self.task, *self.scoring.command_words()]
        if self.infer:
            words.append("--infer")
        if self.precision == "fp8" and self.recipe is not None:
            words += ["--recipe", self.recipe]
        for pattern in self.keep:
            words += ["--keep", pattern]
        for name, value in {**self.settings, **self.instances}.items():
            words += setting_words(name, value)
        return shlex.join(words)


def setting_words(name: str, value: object) -> list[str]:
    """The words of a command line that give a setting its value."""
    if isinstance(value, bool):
        return [_option(name) if value else _option(f"no_{name}")]
    return [_option(name), to_text(value)]


def _word(value: object) -> str:
    """A word of a command line that means the same in every directory: a path is absolute."""
    return str(value.absolute() if isinstance(value, Path) and not names_model(value) else value)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
