"""What an engine's settings are where the build wasn't told: by target, and never more than the model can have.

On a CPU, and in a plan whose profiles grow with them, slots and chunks are small. A GPU that the `cuda` runner is for
reads its weights once for all rows: there many slots cost little, and a chunk of a few hundred tokens leaves it idle.
"""

from __future__ import annotations

from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets.cuda_weights import decoder_shape
from deepseek_triton.ensemble.artefacts.cuda_layout import LayoutError
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError

CUDA_MAX_NUM_SEQS = 64
CUDA_CACHE_BYTES = 32 * 2**30  # the most that default slots take of a GPU; the runner tells what really fits
CUDA_MAX_NUM_BATCHED_TOKENS = (
    8192  # of several prompts: what serving needs to keep an H100 busy (benchmarks/serving_gpu.py)
)
CUDA_MAX_PREFILL_STALL = 10.0  # beside running sequences it is then some 2,000 tokens at batch 1, 4,000 at 64


def engine_settings(options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> EngineSettings:
    """The settings that `options` ask for, with its target's defaults for the others.

    Raises:
        BuildError: the chunk that was asked for is longer than a sequence, or the model can't be split over so many
            GPUs.
    """
    defaults: dict[str, Any] = {"max_num_batched_tokens": min(EngineSettings.max_num_batched_tokens, max_seq_len)}
    if options.target == "cuda":
        one_slot = _split(options, spec, max_seq_len).shape.cache_bytes(1)
        defaults = {
            "max_num_seqs": max(1, min(CUDA_MAX_NUM_SEQS, CUDA_CACHE_BYTES // one_slot)),
            "max_num_batched_tokens": CUDA_MAX_NUM_BATCHED_TOKENS,
            "max_prefill_stall": CUDA_MAX_PREFILL_STALL,
        }
    settings = EngineSettings(**{**defaults, **options.settings})
    try:
        settings.check_max_num_batched_tokens(options.target, max_seq_len)
    except SettingsError as error:
        raise BuildError(str(error)) from error
    return settings


def _split(options: BuildOptions, spec: ModelSpec, max_seq_len: int) -> ShardedDecoder:
    size = EngineSettings(**options.settings).tensor_parallel_size
    try:
        return ShardedDecoder(decoder_shape(spec, max_seq_len), 0, size)
    except LayoutError as error:
        raise BuildError(str(error)) from error
