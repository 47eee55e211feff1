"""Load the runner of an engine: the manifest names the target, and the module of that name has the loader.

A target's module in this package has `load(directory, manifest, settings)`, and `load_scoring` where a Python model
runs its scoring engines. Nothing else on the serving side names a target.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.base import Runner, RunnerError
from deepseek_triton.ensemble.engine.runners.scoring import ScoringRunner
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError
from deepseek_triton.ensemble.scoring.settings import ScoringSettings


def load_runner(directory: Path, settings: EngineSettings) -> tuple[Manifest, Runner]:
    """Check the artefacts in `directory` against their manifest and load them.

    Raises:
        ManifestError: the artefacts or the installed packages don't fit the manifest.
        RunnerError: there is no runner for the manifest's target, it lacks a setting, or loading failed.
    """
    manifest = Manifest.load(directory)
    manifest.verify(directory)
    try:
        settings.check_target(manifest.target)
        settings.check_max_num_batched_tokens(manifest.target, manifest.max_seq_len)
    except SettingsError as error:
        raise RunnerError(str(error)) from error
    runner: Runner = _loader(directory, manifest).load(directory, manifest, settings)
    return manifest, runner


def load_scoring_runner(directory: Path, settings: ScoringSettings) -> ScoringRunner:
    """Check the scoring artefacts in `directory` against their manifest and load them.

    Raises:
        ManifestError: the artefacts or the installed packages don't fit the manifest.
        RunnerError: no Python model runs the target's scoring engines, or loading failed.
    """
    manifest = Manifest.load(directory)
    manifest.verify(directory)
    loader = _loader(directory, manifest)
    if not hasattr(loader, "load_scoring"):
        raise RunnerError(f"{directory} is built for target {manifest.target!r}: Triton's own backend runs it")
    runner: ScoringRunner = loader.load_scoring(directory, manifest, settings)
    return runner


def _loader(directory: Path, manifest: Manifest) -> ModuleType:
    """The module of the manifest's target."""
    name = manifest.target.replace("-", "_")
    if name.isidentifier() and find_spec(f"{__package__}.{name}"):
        module = importlib.import_module(f"{__package__}.{name}")
        if hasattr(module, "load"):
            return module
    raise RunnerError(f"{directory} is built for target {manifest.target!r}, which this version has no runner for")
