"""Target cuda: load the runner, on one GPU or on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.base import Runner, RunnerError
from deepseek_triton.ensemble.protocol.settings import EngineSettings


def load(directory: Path, manifest: Manifest, settings: EngineSettings) -> Runner:
    """Load the runner of an engine that generates text.

    Raises:
        RunnerError: torch isn't installed, the artefacts are damaged, or the model doesn't fit.
    """
    from deepseek_triton.ensemble.artefacts.cuda_layout import WEIGHTS_FILE, DecoderShape, LayoutError
    from deepseek_triton.ensemble.artefacts.tensor_file import TensorFileError

    try:
        from deepseek_triton.ensemble.engine.runners.cuda.parallel import ParallelRunner
        from deepseek_triton.ensemble.engine.runners.cuda.ranks import end_process
        from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
        from deepseek_triton.ensemble.engine.runners.cuda.weights import StoredWeights
    except ModuleNotFoundError as error:
        raise RunnerError(f"{error.name} is not installed; pip install 'deepseek-triton[cuda]'") from error
    options: dict[str, Any] = {
        "max_num_seqs": settings.max_num_seqs,
        # No step can have more tokens than all slots together hold.
        "max_num_batched_tokens": min(
            settings.max_num_batched_tokens, settings.max_num_seqs * manifest.max_seq_len
        ),
        "is_invariant": settings.batch_invariant,
    }  # fmt: skip
    try:
        shape, source = DecoderShape.from_dict(manifest.engine), StoredWeights(directory / WEIGHTS_FILE)
    except (LayoutError, TensorFileError) as error:
        raise RunnerError(f"{directory}: {error}; {manifest.command}") from error
    if settings.tensor_parallel_size == 1:
        return CudaRunner(source, shape, **options)
    # A rank that fails ends this process; the watchdog then ends the server, which is started again.
    return ParallelRunner(source, shape, size=settings.tensor_parallel_size, on_failure=end_process, **options)
