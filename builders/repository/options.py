"""The options of a build: checked once, and written again as the command line that repeats the build."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.scoring.options import ScoringOptions
from deepseek_triton.builders.targets import DEFAULT_TARGET, all_targets, target_named
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError
from deepseek_triton.ensemble.scoring.settings import ScoringSettings

TASKS = ("generate", "score")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# Called with the name of what is done now, and its progress and total in units of its own (bytes for "weights").
Report = Callable[[str, int, int], None]


def precisions() -> tuple[str, ...]:
    """The precisions of all targets together."""
    return tuple(dict.fromkeys(precision for target in all_targets() for precision in target.precisions))


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    task: "generate" makes the ensemble that streams text; "score" the one that chooses among labels in one pass without
        a cache; scoring: for it alone.
    max_seq_len: tokens in a sequence, prompt and answer; None: the model's own limit, as far as its caches fit.
    settings: of the engine, by their names in EngineSettings; what isn't there has its target's default.
    recipe, keep: for fp8, a name in `builders.fp8.recipe.RECIPES` and patterns of modules that are not quantised.
    calibration_text: for fp8, a text file; None: the built-in set and text of the model's own. ranges: a file of
        activation ranges, read where it exists, else written. compute_capability: of the GPU that will serve, as
        "8.9", for TensorRT; None: this machine's. timing_cache: TensorRT's, kept between builds.

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
    recipe: str = "default"
    keep: tuple[str, ...] = ()
    calibration_text: Path | None = None
    ranges: Path | None = None
    compute_capability: str | None = None
    timing_cache: Path | None = None
    scoring: ScoringOptions = field(default_factory=ScoringOptions)

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise BuildError(f"name is {self.name!r}; use letters, digits, '.', '_' and '-', the first not a sign")
        target = target_named(self.target)
        self._check_task()
        if self.precision not in precisions():
            raise BuildError(f"precision is {self.precision!r}; supported: {', '.join(precisions())}")
        if self.precision not in target.precisions:
            choices = ", ".join(target.precisions)
            raise BuildError(f"precision is {self.precision!r}; target {self.target} has {choices}")
        try:
            EngineSettings(**self.settings).check_target(self.target)
        except SettingsError as error:
            raise BuildError(str(error)) from error
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise BuildError(f"max_seq_len is {self.max_seq_len}, must be at least 2")
        if self.precision != "fp8":
            for name in ("keep", "calibration_text", "ranges"):
                if getattr(self, name):
                    raise BuildError(f"{name} is for precision fp8, this is {self.precision}")
        if not target.is_compiled:
            for name in ("compute_capability", "timing_cache"):
                if getattr(self, name):
                    raise BuildError(f"{name} is for TensorRT, the target is {self.target}")

    def _check_task(self) -> None:
        if self.task not in TASKS:
            raise BuildError(f"task is {self.task!r}; supported: {', '.join(TASKS)}")
        if self.task not in target_named(self.target).tasks:
            others = " or ".join(target.name for target in all_targets() if self.task in target.tasks)
            raise BuildError(
                f"target is {self.target!r}, which task {self.task} doesn't have: it runs in Triton's own tensorrt "
                f"backend, or on a CPU; use target {others}"
            )
        if self.task != "score":
            if self.scoring != ScoringOptions():
                raise BuildError(f"scoring options are for task score, this is {self.task}")
            return
        for name in self.settings:
            if name not in ScoringSettings.table():
                raise BuildError(f"{_option(name)} is for task generate: a scoring model keeps no cache; leave it out")

    def command(self) -> str:
        """The command line that builds this again."""
        words = ["deepseek-triton", "build", str(self.checkpoint), "--name", self.name, "--target", self.target]
        words += ["--precision", self.precision, "--repository", str(self.repository)]
        optional = ("max_seq_len", "calibration_text", "ranges", "compute_capability", "timing_cache")
        for name in optional:
            if getattr(self, name) is not None:
                words += [_option(name), str(getattr(self, name))]
        if self.task != "generate":
            words += ["--task", self.task, *self.scoring.command_words()]
        if self.precision == "fp8":
            words += ["--recipe", self.recipe]
        for pattern in self.keep:
            words += ["--keep", pattern]
        for name, value in self.settings.items():
            if value is not False:
                words += [_option(name)] if value is True else [_option(name), str(value)]
        return shlex.join(words)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
