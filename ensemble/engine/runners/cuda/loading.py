"""Target cuda: load the runner of an engine that generates, on one GPU or on several, or of one that scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_triton.ensemble.artefacts.cuda_settings import PREFIX_IDS
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.base import Runner, RunnerError
from deepseek_triton.ensemble.engine.runners.scoring import ScoringRunner
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.scoring.settings import ScoringSettings
from deepseek_triton.extras import explain_missing

if TYPE_CHECKING:
    from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
    from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource


def load(directory: Path, manifest: Manifest, settings: EngineSettings) -> Runner:
    """Load the runner of an engine that generates text.

    Raises:
        RunnerError: torch isn't installed, the artefacts are damaged, or the model doesn't fit.
    """
    from deepseek_triton.ensemble.artefacts.cuda_layout import ONE_GPU, has_block_scales
    from deepseek_triton.ensemble.engine.runners.cuda.startup.kernel_cache import use_kernel_cache

    use_kernel_cache(directory)  # before Triton is imported
    try:
        from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm
        from deepseek_triton.ensemble.engine.runners.cuda.parallel import ParallelRunner
        from deepseek_triton.ensemble.engine.runners.cuda.ranks import end_process
        from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
    except ModuleNotFoundError as error:
        raise RunnerError(explain_missing(error) or str(error)) from error
    options: dict[str, Any] = {
        "max_num_seqs": settings.max_num_seqs,
        # No step can have more tokens than all slots together hold.
        "max_num_batched_tokens": min(
            settings.max_num_batched_tokens, settings.max_num_seqs * manifest.max_seq_len
        ),
        "is_invariant": settings.batch_invariant,
        "cache_form": CacheForm(settings.kv_cache, settings.kv_cache_tokens),
    }  # fmt: skip
    shape, source = _artefacts(directory, manifest)
    size, expert_size = settings.tensor_parallel_size, settings.expert_parallel_size
    if size * expert_size > 1 and has_block_scales(source.entries):
        raise RunnerError(f"{directory}: {size * expert_size} GPUs: {ONE_GPU}")
    if size == expert_size == 1:
        return CudaRunner(source, shape, **options)
    # A rank that fails ends this process; the watchdog then ends the server, which is started again.
    return ParallelRunner(
        source, shape, size=size, expert_size=expert_size, on_failure=end_process, **options
    )  # fmt: skip


def load_scoring(directory: Path, manifest: Manifest, settings: ScoringSettings) -> ScoringRunner:
    """Load the runner of a scoring engine, on one GPU.

    Raises:
        RunnerError: as `load`.
    """
    from deepseek_triton.ensemble.engine.runners.cuda.startup.kernel_cache import use_kernel_cache

    use_kernel_cache(directory)  # before Triton is imported
    try:
        from deepseek_triton.ensemble.engine.runners.cuda.scoring.runner import CudaScoringRunner
    except ModuleNotFoundError as error:
        raise RunnerError(explain_missing(error) or str(error)) from error
    shape, source = _artefacts(directory, manifest)
    prefix = manifest.engine.get(PREFIX_IDS, ())
    return CudaScoringRunner(source, shape, max_pass_tokens=settings.max_pass_tokens, prefix=prefix)


def _artefacts(directory: Path, manifest: Manifest) -> tuple[DecoderShape, WeightSource]:
    """The decoder's dimensions and its weights."""
    from deepseek_triton.ensemble.artefacts.cuda_layout import WEIGHTS_FILE, DecoderShape, LayoutError
    from deepseek_triton.ensemble.artefacts.tensor_file import TensorFileError
    from deepseek_triton.ensemble.engine.runners.cuda.weights import StoredWeights

    own = {name: value for name, value in manifest.engine.items() if name != PREFIX_IDS}
    try:
        return DecoderShape.from_dict(own), StoredWeights(directory / WEIGHTS_FILE)
    except (LayoutError, TensorFileError) as error:
        raise RunnerError(f"{directory}: {error}; {manifest.command}") from error
