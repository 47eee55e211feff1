"""The config.pbtxt files of a built model that are missing or can't be parsed, written anew with the defaults.

A repository and a name enter; the paths that were written leave. What can be parsed stays as it is: single values that
can't be read are `configure`'s business.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.models.built import CONFIG, from_plain, is_version
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import ScoringOptions
from deepseek_triton.builders.scoring.parts import scoring_configs
from deepseek_triton.builders.targets import target_named
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.artefacts.manifest import Manifest, ManifestError
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.protocol.pipelines import (
    BESIDE_SUFFIXES,
    ENGINE_SUFFIX,
    GENERATE_PIPELINE,
    SCORER_SUFFIX,
    model_name,
)

# Settings that the artefacts, or what fits beside them, depend on.
FIXED = ("tensor_parallel_size", "expert_parallel_size", "pipeline_parallel_size")


def write_unreadable_anew(repository: Path, name: str) -> list[Path]:
    """Write the model's configurations that can't be parsed; returns their paths.

    Raises:
        BuildError: no version of the model has a manifest that can be read, or a file can't be written.
    """
    parts = [model_name(name, suffix) for suffix in ("tokenizer", "detokenizer", SCORER_SUFFIX, ENGINE_SUFFIX)]
    beside = (model_name(name, suffix) for suffix in BESIDE_SUFFIXES)
    directories = [repository / part for part in (name, *parts, *beside)]
    broken = [path / CONFIG for path in directories if path.is_dir() and not _is_readable(path / CONFIG)]
    if not broken:
        return []
    configs = {config.name: config for config in _default_configs(repository, name)}
    for path in broken:
        if path.parent.name in configs:
            write_atomically(path, pbtxt.to_text(configs[path.parent.name]).encode(), BuildError)
    return broken


def _is_readable(path: Path) -> bool:
    try:
        pbtxt.parse_text(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError, pbtxt.PbtxtError):
        return False
    return True


def _default_configs(repository: Path, name: str) -> tuple[ModelConfig, ...]:
    """Every configuration of the newest version, with the settings' defaults."""
    manifest = _newest_manifest(repository / model_name(name, ENGINE_SUFFIX))
    target = target_named(manifest.target)
    spec: ModelSpec = from_plain(ModelSpec, manifest.spec)
    checkpoint = Path(manifest.checkpoint)
    words = shlex.split(manifest.command)
    if (repository / model_name(name, SCORER_SUFFIX)).is_dir():
        scoring = ScoringOptions(embeddings="--embeddings" in words)
        options = BuildOptions(checkpoint, name, target=target.name, task="score", scoring=scoring)
        return scoring_configs(options, spec.hidden_size)
    given = {setting: f"--{setting.replace('_', '-')}" for setting in FIXED}
    fixed: dict[str, Any] = {
        setting: int(words[words.index(option) + 1]) for setting, option in given.items() if option in words
    }
    fixed |= manifest.engine.get("settings", {})
    options = BuildOptions(
        checkpoint, name, target=target.name, precision=manifest.precision, settings={**fixed}, recipe=None
    )
    settings = target.settings(options, spec, manifest.max_seq_len)
    limits = {key: manifest.engine[key] for key in target.compiled_settings if key in manifest.engine}
    lowered = {key: min(limit, asdict(settings)[key]) for key, limit in limits.items() if key in asdict(settings)}
    settings = type(settings)(**{**asdict(settings), **lowered})
    return (
        pbtxt.tokenizer_config(name),
        pbtxt.detokenizer_config(name),
        pbtxt.engine_config(name, target.parameters(settings)),
        pbtxt.ensemble_config(name, GENERATE_PIPELINE),
        pbtxt.infer_config(name),
        pbtxt.vllm_config(name),
    )


def _newest_manifest(engine: Path) -> Manifest:
    versions = sorted((path for path in engine.glob("*") if is_version(path)), key=lambda path: int(path.name))
    if not versions:
        raise BuildError(f"{engine} has no version: build the model again")
    try:
        return Manifest.load(versions[-1])
    except ManifestError as error:
        raise BuildError(str(error)) from error
