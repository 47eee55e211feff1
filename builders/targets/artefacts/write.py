"""A checkpoint → an engine's version directory: the target's artefacts, and the manifest that describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deepseek_triton.builders.checkpoint.files.hub_cache import model_name
from deepseek_triton.builders.lifecycle.provenance import provenance_of
from deepseek_triton.builders.targets import target_named
from deepseek_triton.builders.targets.artefacts.target import Artefacts, BuildJob, Target
from deepseek_triton.ensemble.artefacts.manifest import ArtefactFile, Manifest, installed_versions
from deepseek_triton.ensemble.protocol.settings import EngineSettings

PACKAGES = ("deepseek-triton", "numpy", "tokenizers")  # what every build uses


def write_engine(target: Target, job: BuildJob, settings: EngineSettings) -> None:
    """Write an engine that generates text, and its manifest.json.

    Raises:
        BuildError: no room, a package is missing, or calibration or compilation failed.
    """
    target.preflight(job.options, job.spec, job.directory)
    _save_manifest(job, target.write(job, settings))


def write_scoring_engine(target: Target, job: BuildJob, prefix_ids: Sequence[int] = ()) -> None:
    """Write an engine that scores texts, and its manifest.json.

    prefix_ids: the tokens that the prompts of all texts begin with.

    Raises:
        BuildError: as `write_engine`.
    """
    target.preflight(job.options, job.spec, job.directory)
    _save_manifest(job, target.write_scoring(job, prefix_ids))


def _save_manifest(job: BuildJob, artefacts: Artefacts) -> None:
    options, spec = job.options, job.spec
    Manifest(
        name=options.name,
        target=options.target,
        precision=options.precision,
        checkpoint=model_name(job.checkpoint.path),
        adapter=dict(job.checkpoint.adapter),
        provenance=provenance_of(job.checkpoint.path),
        checkpoint_sha256=job.checkpoint.digest(),
        spec=spec.to_dict(),
        limits={"max_seq_len": job.max_seq_len},
        end_ids=job.end_ids,
        shapes=artefacts.shapes,
        versions=installed_versions((*PACKAGES, *target_named(options.target).packages)),
        requires=artefacts.requires,
        files={file.name: _measured(file, artefacts.digests) for file in artefacts.files},
        command=options.command(),
        recipe=artefacts.recipe.to_dict() if artefacts.recipe else {},
        engine=artefacts.engine,
        sampling=dict(job.checkpoint.sampling),
    ).save(job.directory)


def _measured(file: Path, digests: Mapping[str, str]) -> ArtefactFile:
    digest = digests.get(file.name)
    return ArtefactFile.of(file) if digest is None else ArtefactFile.known(file, digest)
