"""How much memory the steps of target `cuda` take beside weights and caches: its builder and its runner ask."""

from __future__ import annotations

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.options import ExpertOptions, LatentOptions

MIB = 2**20
RESERVE = 512 * MIB  # cuBLAS workspaces, kernels, fragmentation
COLLECTIVES = 512 * MIB  # NCCL's buffers
ONE_KERNEL_HEADS = 16  # of latent attention, at most


def has_one_latent_kernel(num_heads: int, latent: LatentOptions | None, experts: ExpertOptions | None) -> bool:
    """Whether one kernel decodes one sequence of such latent attention and experts, on one GPU.

    The kernel's own conditions are in ensemble/engine/runners/cuda/persistent/latent.py; a test holds both together.
    """
    if latent is None or experts is None:
        return False
    has_groups = experts.num_groups > 1 and experts.choice != "greedy"
    return latent.q_lora_rank is None and num_heads <= ONE_KERNEL_HEADS and not has_groups


def step_bytes(shape: DecoderShape, max_num_seqs: int, max_num_batched_tokens: int, num_ranks: int = 1) -> int:
    """Estimate of the bytes that the largest steps need besides weights and caches."""
    widest = 2 * shape.intermediate_size + shape.intermediate_size + 6 * shape.hidden_size
    attention = 2 * shape.q_size
    if shape.latent is not None:  # each head's query and output are as wide as the latent
        attention += shape.num_heads * (shape.latent.kv_lora_rank + shape.latent.qk_rope_head_dim)
    if shape.experts is not None:  # of each of a token's experts: gate_up's output, its codes, and down's output
        own = MixtureOfExperts(shape.hidden_size, shape.experts, shape.expert_share).own
        widest += shape.experts.num_experts_per_tok * (own.intermediate_size + shape.hidden_size)
        widest += 3 * own.shared_size
    tiles = 0
    has_one = num_ranks == 1 and has_one_latent_kernel(shape.num_heads, shape.latent, shape.experts)
    if has_one and shape.latent is not None:  # that kernel has the keys' matrices once more
        keys = shape.latent.qk_nope_head_dim * shape.latent.kv_lora_rank
        tiles = 2 * shape.num_layers * shape.num_heads * keys
    prefill = max_num_batched_tokens * 4 * (widest + attention)
    logits = 5 * max_num_seqs * shape.vocab_size * 4  # each decode graph has its own, some 3.5 times max_num_seqs rows
    return prefill + logits + tiles + RESERVE + (COLLECTIVES + logits if num_ranks > 1 else 0)
