"""The settings and files of target vllm, which its builder and its engine share."""

from __future__ import annotations

from deepseek_triton.ensemble.protocol.target_settings import TargetSettings

ARGUMENTS_FILE = "model.json"  # vLLM's engine arguments, beside the configuration of the vLLM backend's model
TOKENIZER_FOLDER = "tokenizer"
# What vLLM's arguments are written from; a change of the others takes effect without a new build.
FIXED_SETTINGS = (
    "tensor_parallel_size", "pipeline_parallel_size", "expert_parallel", "gpu_memory_share", "max_num_batched_tokens",
    "prefix_reuse",
)  # fmt: skip
VLLM_SETTINGS = TargetSettings(
    own=("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel", "gpu_memory_share"),
    # vLLM schedules its steps and its threads itself.
    without=("max_prefill_stall", "num_threads"),
    defaults={"max_num_seqs": 64, "max_num_batched_tokens": 8192},
    notes={"max_num_batched_tokens": "of several prompts"},
    packs_prompts=True,
)
