"""Load the runner of an engine: the manifest names the target, and the module of that name has the loader.

A target's module in this package has `load(directory, manifest, settings)`, `load_scoring` where a Python model runs
its scoring engines, and `SETTINGS` where its settings differ from the common ones. Nothing else on the serving side
names a target.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.remote.model import RemoteModel
from deepseek_triton.ensemble.engine.runners.base import Runner, RunnerError
from deepseek_triton.ensemble.engine.runners.scoring import ScoringRunner
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError
from deepseek_triton.ensemble.protocol.target_settings import TargetSettings
from deepseek_triton.ensemble.scoring.settings import ScoringSettings


def load_runner(directory: Path, settings: EngineSettings) -> tuple[Manifest, Runner]:
    """As `load_model`, for a target that computes in this process.

    Raises:
        ManifestError: as `load_model`. RunnerError: as there, or another model computes.
    """
    manifest, runner = load_model(directory, settings)
    if isinstance(runner, RemoteModel):
        raise RunnerError(f"{directory} is built for target {manifest.target!r}: another model of the server runs it")
    return manifest, runner


def load_model(directory: Path, settings: EngineSettings) -> tuple[Manifest, Runner | RemoteModel]:
    """Check the artefacts in `directory` against their manifest and load them.

    Returns:
        The manifest, and a runner; or a RemoteModel where another model of the server computes.

    Raises:
        ManifestError: the artefacts or the installed packages don't fit the manifest.
        RunnerError: there is no runner for the manifest's target, it lacks a setting, or loading failed.
    """
    manifest = Manifest.load(directory)
    manifest.verify(directory)
    loader = _loader(directory, manifest)
    own: TargetSettings = getattr(loader, "SETTINGS", TargetSettings())
    try:
        own.check(settings, manifest.target)
        own.check_max_num_batched_tokens(settings, manifest.max_seq_len)
    except SettingsError as error:
        raise RunnerError(str(error)) from error
    runner: Runner | RemoteModel = loader.load(directory, manifest, settings)
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
