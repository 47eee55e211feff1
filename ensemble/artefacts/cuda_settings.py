"""The settings of target cuda, which its builder and its runner share."""

from __future__ import annotations

from deepseek_triton.ensemble.protocol.target_settings import TargetSettings

PREFIX_IDS = "prefix_ids"  # a scoring engine's, in its manifest among the decoder's dimensions

# A GPU reads its weights once for all rows of a step, so many sequences and many prompt tokens at once cost little.
CUDA_SETTINGS = TargetSettings(
    own=("batch_invariant", "tensor_parallel_size", "expert_parallel_size", "kv_cache", "kv_cache_tokens"),
    defaults={"max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_prefill_stall": 10.0, "kv_cache": "pages"},
    notes={
        "max_num_seqs": "with slots fewer where their caches would exceed 32 GiB",
        "max_num_batched_tokens": "of several prompts",
    },
    packs_prompts=True,
    scoring_without=("num_threads",),
    scoring_defaults={"max_pass_tokens": 4096},
)
