"""A checkpoint → an engine's version directory: the target's artefacts, and the manifest that describes them."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_triton.builders.targets.artefacts.target import Artefacts, BuildJob, Target
from deepseek_triton.ensemble.artefacts.manifest import ArtefactFile, Manifest, installed_versions
from deepseek_triton.ensemble.protocol.settings import EngineSettings

PACKAGES = ("deepseek-triton", "numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "tokenizers")


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
        checkpoint=job.checkpoint.path.name,
        checkpoint_sha256=job.checkpoint.digest(),
        spec=spec.to_dict(),
        limits={"max_seq_len": job.max_seq_len},
        end_ids=spec.eos_token_ids,
        shapes=artefacts.shapes,
        versions=installed_versions(PACKAGES),
        requires=artefacts.requires,
        files={file.name: ArtefactFile.of(file) for file in artefacts.files},
        command=options.command(),
        recipe=artefacts.recipe.to_dict() if artefacts.recipe else {},
        engine=artefacts.engine,
    ).save(job.directory)
