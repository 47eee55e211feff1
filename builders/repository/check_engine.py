"""Check an engine without a server: its files against its manifest, and its settings against its target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.wiring import Problem
from deepseek_triton.builders.targets import target_named
from deepseek_triton.ensemble.artefacts.manifest import FILE_NAME as MANIFEST
from deepseek_triton.ensemble.artefacts.manifest import Manifest, ManifestError
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError


def check_engine(where: Path, version_dir: Path, config: ModelConfig) -> Iterator[Problem]:
    """Check one version of an engine that generates text, whose config.pbtxt is `where`."""
    file_problems = check_engine_files(version_dir)
    yield from file_problems
    try:
        parameters = {name: value.string_value for name, value in config.parameters.items()}
        settings = EngineSettings.from_parameters(parameters)
    except SettingsError as error:
        yield Problem(str(where), f"parameters: {error}")
        return
    if not config.model_transaction_policy.decoupled:
        yield Problem(str(where), "model_transaction_policy.decoupled is false, an engine streams: set it to true")
    if file_problems:
        return
    manifest = Manifest.load(version_dir)
    if problem := _end_problem(manifest):
        yield Problem(str(version_dir / MANIFEST), f"{problem}; rebuild with: {manifest.command}")
    try:
        target = target_named(manifest.target)
    except BuildError as error:
        yield Problem(str(version_dir / MANIFEST), f"{error}; rebuild with: {manifest.command}")
        return
    for problem in target.check(manifest, settings):
        yield Problem(str(where), f"parameters: {problem}")


def _end_problem(manifest: Manifest) -> str | None:
    """What is wrong with the tokens that end a text."""
    vocab_size = manifest.spec.get("vocab_size", math.inf)
    if manifest.end_ids and all(0 <= index < vocab_size for index in manifest.end_ids):
        return None
    ends = list(manifest.end_ids)
    return f"end_ids are {ends}, must be at least one of the model's {vocab_size} tokens, or no text would end"


def check_plan(where: Path, version_dir: Path, config: ModelConfig) -> Iterator[Problem]:
    """Check one version of a scoring plan, which Triton's own backend runs."""
    problems = check_engine_files(version_dir)
    yield from problems
    limit = None if problems else Manifest.load(version_dir).engine.get("max_batch_size")
    if limit is not None and config.max_batch_size > limit:
        what = f"max_batch_size is {config.max_batch_size}, the plan was built for {limit}: lower it"
        yield Problem(str(where), what)


def check_engine_files(version_dir: Path) -> list[Problem]:
    """Check that the engine has a manifest, and that the files which it names have their lengths."""
    try:
        manifest = Manifest.load(version_dir)
    except ManifestError as error:
        path = version_dir / MANIFEST
        return [Problem(str(path), str(error).removeprefix(str(path)).lstrip(": "))]
    problems = []
    for name, expected in manifest.files.items():
        path = version_dir / name
        if not path.is_file():
            problems.append(Problem(str(path), f"is missing; rebuild with: {manifest.command}"))
        elif (size := path.stat().st_size) != expected.bytes:
            what = f"has {size} bytes, the manifest says {expected.bytes}; rebuild with: {manifest.command}"
            problems.append(Problem(str(path), what))
    return problems
