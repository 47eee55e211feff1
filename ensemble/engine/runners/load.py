"""Runners, by the target that a manifest names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensorrt_api import PLAN_FILE, TARGETS, PlanInfo, TensorRTError
from deepseek_triton.ensemble.engine.runners.base import Runner, RunnerError
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError
from deepseek_triton.extras import install_command


def load_runner(directory: Path, settings: EngineSettings) -> tuple[Manifest, Runner]:
    """Check the artefacts in `directory` against their manifest and load them.

    Raises:
        ManifestError: the artefacts or the installed packages don't fit the manifest.
        RunnerError: no runner for the manifest's target, a setting that it can't have, or loading failed.
    """
    manifest = Manifest.load(directory)
    manifest.verify(directory)
    try:
        settings.check_target(manifest.target)
        settings.check_max_num_batched_tokens(manifest.target, manifest.max_seq_len)
    except SettingsError as error:
        raise RunnerError(str(error)) from error
    if manifest.target == "onnx":
        from deepseek_triton.ensemble.engine.runners.onnx import OnnxRunner

        return manifest, OnnxRunner(
            directory / "model.onnx", max_num_seqs=settings.max_num_seqs, num_threads=settings.num_threads
        )
    if manifest.target in TARGETS:
        from deepseek_triton.ensemble.engine.runners.tensorrt import TensorRTRunner

        try:
            plan = PlanInfo.from_dict({name: value for name, value in manifest.engine.items() if name != "census"})
        except TensorRTError as error:
            raise RunnerError(f"{directory}: {error}; {manifest.command}") from error
        return manifest, TensorRTRunner(
            directory / PLAN_FILE,
            plan,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
        )
    if manifest.target == "cuda":
        return manifest, _load_cuda(directory, manifest, settings)
    raise RunnerError(f"{directory} is built for target {manifest.target!r}, which this version has no runner for")


def _load_cuda(directory: Path, manifest: Manifest, settings: EngineSettings) -> Runner:
    from deepseek_triton.ensemble.artefacts.cuda_layout import WEIGHTS_FILE, DecoderShape, LayoutError
    from deepseek_triton.ensemble.artefacts.tensor_file import TensorFileError

    try:
        from deepseek_triton.ensemble.engine.runners.cuda.parallel import ParallelRunner
        from deepseek_triton.ensemble.engine.runners.cuda.ranks import end_process
        from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
        from deepseek_triton.ensemble.engine.runners.cuda.weights import StoredWeights
    except ModuleNotFoundError as error:
        raise RunnerError(f"{error.name} is not installed; run: {install_command('cuda')}") from error
    options: dict[str, Any] = {
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": min(
            settings.max_num_batched_tokens, settings.max_num_seqs * manifest.max_seq_len
        ),  # what it can be given
        "is_invariant": settings.batch_invariant,
    }
    try:
        shape, source = DecoderShape.from_dict(manifest.engine), StoredWeights(directory / WEIGHTS_FILE)
    except (LayoutError, TensorFileError) as error:
        raise RunnerError(f"{directory}: {error}; {manifest.command}") from error
    if settings.tensor_parallel_size == 1:
        return CudaRunner(source, shape, **options)
    # A rank that fails ends this process, and whoever watches it the server, which starts again.
    return ParallelRunner(source, shape, size=settings.tensor_parallel_size, on_failure=end_process, **options)
