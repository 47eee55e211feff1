"""Check a scoring model's parts without a server: the profile, the calibration, and how Triton batches requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.check_engine import check_engine_files
from deepseek_triton.builders.repository.wiring import Problem
from deepseek_triton.builders.targets import target_named
from deepseek_triton.ensemble.artefacts.manifest import FILE_NAME as MANIFEST
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.protocol.contract import BRANCH_IDS, LABELS, TARGET_LABELS
from deepseek_triton.ensemble.protocol.settings import SettingsError
from deepseek_triton.ensemble.scoring.calibration import FILE_NAME as CALIBRATION_FILE
from deepseek_triton.ensemble.scoring.calibration import ProbabilityCalibration, ProbabilityCalibrationError
from deepseek_triton.ensemble.scoring.profile import FILE_NAME as PROFILE_FILE
from deepseek_triton.ensemble.scoring.profile import ScoringProfile, ScoringProfileError
from deepseek_triton.ensemble.scoring.settings import ScoringSettings

_MARKS = {LABELS.name, BRANCH_IDS.name, TARGET_LABELS.name}  # the input that only this part has


def is_scoring(config: ModelConfig) -> bool:
    """Whether this is a part of a scoring model."""
    return config.platform != "ensemble" and any(tensor.name in _MARKS for tensor in config.input)


def check_scoring(directory: Path, version_dir: Path, config: ModelConfig) -> Iterator[Problem]:
    """Check one version of a part."""
    names = {tensor.name for tensor in config.input}
    if BRANCH_IDS.name in names:
        yield from _check_engine(directory / "config.pbtxt", version_dir, config)
        return
    profile = None
    try:
        profile = ScoringProfile.load(version_dir)
    except ScoringProfileError as error:
        yield _problem(version_dir / PROFILE_FILE, error)
    if TARGET_LABELS.name in names:
        try:
            calibration = ProbabilityCalibration.load(version_dir)
        except ProbabilityCalibrationError as error:
            yield _problem(version_dir / CALIBRATION_FILE, error)
            return
        if profile and calibration and calibration.normalisation != profile.normalisation:
            what = f"was fitted on {calibration.normalisation} scores, the profile says {profile.normalisation}"
            yield Problem(str(version_dir / CALIBRATION_FILE), f"{what}: fit it again")


def _check_engine(where: Path, version_dir: Path, config: ModelConfig) -> Iterator[Problem]:
    if not config.HasField("dynamic_batching"):
        yield Problem(str(where), "dynamic_batching is missing: every request would run by itself; add it")
    for tensor in config.input:
        if not tensor.allow_ragged_batch:
            what = f"input {tensor.name!r} has no allow_ragged_batch: prompts of different lengths would never batch"
            yield Problem(str(where), what)
    preferred = [size for size in config.dynamic_batching.preferred_batch_size if size > config.max_batch_size]
    if preferred:
        what = f"preferred_batch_size {preferred[0]} is above max_batch_size, {config.max_batch_size}: lower it"
        yield Problem(str(where), what)
    if config.backend != "python":
        return
    try:
        ScoringSettings.from_parameters({name: value.string_value for name, value in config.parameters.items()})
    except SettingsError as error:
        yield Problem(str(where), f"parameters: {error}")
    problems = check_engine_files(version_dir)
    yield from problems
    if not problems:
        yield from _check_manifest(where, version_dir)


def _check_manifest(where: Path, version_dir: Path) -> Iterator[Problem]:
    manifest = Manifest.load(version_dir)
    try:
        target = target_named(manifest.target)
    except BuildError as error:
        yield Problem(str(version_dir / MANIFEST), f"{error}; rebuild with: {manifest.command}")
        return
    for problem in target.check_scoring(manifest):
        yield Problem(str(where), problem)


def _problem(path: Path, error: Exception) -> Problem:
    """The error of a loader, whose message begins with the path."""
    return Problem(str(path), str(error).removeprefix(str(path)).lstrip(": "))
