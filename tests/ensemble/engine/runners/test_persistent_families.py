"""Which decoders the persistent kernels take, and how they divide a block's shared memory; no GPU, no torch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.options import ExpertOptions, LatentOptions
from deepseek_triton.ensemble.engine.runners.cuda.persistent.dense import DenseFamily
from deepseek_triton.ensemble.engine.runners.cuda.persistent.latent import LatentFamily

H100_BLOCKS, H100_LIMIT = 132, 232448

SMALL_DENSE = DecoderShape(
    vocab_size=1000, hidden_size=576, intermediate_size=1536, num_layers=2, num_heads=9, num_kv_heads=3, head_dim=64,
    rms_norm_eps=1e-5, max_seq_len=2048,
)  # fmt: skip
DENSE_SHAPES = {
    "rows that aren't whole groups": SMALL_DENSE,
    "qk norm, tied": replace(
        SMALL_DENSE, hidden_size=1024, intermediate_size=3072, num_heads=16, num_kv_heads=8, head_dim=128, qk_norm=True,
        tie_word_embeddings=True,
    ),
    "multi-head": replace(
        SMALL_DENSE, hidden_size=512, intermediate_size=1024, num_heads=4, num_kv_heads=4, head_dim=128
    ),
    "rows of several stages": replace(
        SMALL_DENSE, hidden_size=3584, intermediate_size=18944, num_heads=28, num_kv_heads=4, head_dim=128
    ),
}  # fmt: skip
LATENT = LatentOptions(
    q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, softmax_factor=1.3
)
EXPERTS = ExpertOptions(
    num_experts=12, num_experts_per_tok=3, intermediate_size=64, num_shared_experts=2, first_dense_layers=1,
    scores="softmax", choice="greedy",
)  # fmt: skip
SMALL_LATENT = DecoderShape(
    vocab_size=1000, hidden_size=256, intermediate_size=320, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=64,
    rms_norm_eps=1e-5, max_seq_len=1024, latent=LATENT, experts=EXPERTS,
)  # fmt: skip
LITE = replace(
    SMALL_LATENT, hidden_size=2048, intermediate_size=10944, num_heads=16, num_kv_heads=16, head_dim=192,
    latent=replace(LATENT, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    experts=replace(EXPERTS, num_experts=64, num_experts_per_tok=6, intermediate_size=1408),
)  # fmt: skip
LATENT_SHAPES = {
    "fewer heads than a product's rows": SMALL_LATENT,
    "an odd number of experts, more than blocks, no shared ones": replace(
        SMALL_LATENT, experts=replace(EXPERTS, num_experts=161, num_shared_experts=0, first_dense_layers=0)
    ),
    "sigmoid, a bias for the choice, normalised": replace(
        SMALL_LATENT,
        experts=replace(EXPERTS, scores="sigmoid", choice="group_top2", is_normalised=True, scale=2.5),
    ),
    "V2-Lite's layers": LITE,
}


@pytest.mark.parametrize("name", DENSE_SHAPES)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_a_block_has_room_for_several_stages_and_for_what_it_works_on(name: str, is_fp8: bool) -> None:
    shape = DENSE_SHAPES[name]
    family = DenseFamily(shape, is_fp8, H100_BLOCKS, H100_LIMIT)
    memory = family.memory
    widest = max(shape.hidden_size, shape.q_size, shape.intermediate_size)
    assert memory.stages >= 3
    assert memory.total <= H100_LIMIT < memory.total + memory.stage_bytes + 16
    assert memory.scratch_bytes >= widest * (2 if is_fp8 else 4)
    assert memory.stage_bytes % 128 == 0 and 4 * family.kv_block * shape.head_dim <= memory.stage_bytes
    assert 2 * min(shape.hidden_size, 512) <= memory.stage_bytes


@pytest.mark.parametrize("name", LATENT_SHAPES)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_a_block_has_room_for_latents_and_experts(name: str, is_fp8: bool) -> None:
    shape = LATENT_SHAPES[name]
    found = LatentFamily(shape, is_fp8, H100_BLOCKS, H100_LIMIT)
    memory, latent, experts = found.memory, shape.latent, shape.experts
    assert latent is not None and experts is not None
    assert found.reason_against(1) is None
    assert memory.stages >= 10
    assert memory.total <= H100_LIMIT < memory.total + memory.stage_bytes + 16
    assert memory.stage_bytes >= 14 * (2 * (latent.kv_lora_rank + latent.qk_rope_head_dim) + 16)
    activations = shape.hidden_size + experts.num_experts_per_tok * experts.intermediate_size
    assert memory.scratch_bytes >= activations * (2 if is_fp8 else 4)


@pytest.mark.parametrize(
    ("shape", "num_ranks", "reason"),
    [
        (SMALL_LATENT, 2, "one GPU"),
        (replace(SMALL_LATENT, latent=replace(LATENT, q_lora_rank=96)), 1, "the query has two matrices"),
        (replace(SMALL_LATENT, num_heads=32, num_kv_heads=32), 1, "32 heads, more than 16"),
        (replace(SMALL_LATENT, latent=replace(LATENT, kv_lora_rank=96)), 1, "kv_lora_rank 96"),
        (replace(SMALL_LATENT, latent=replace(LATENT, v_head_dim=24)), 1, "v_head_dim 24"),
        (replace(SMALL_LATENT, hidden_size=264), 1, "not multiples of 16"),
        (replace(SMALL_LATENT, experts=None), 1, "no experts"),
        (
            replace(SMALL_LATENT, experts=replace(EXPERTS, choice="group_maximum", num_groups=4, topk_group=2)),
            1,
            "its router chooses among groups",
        ),
        (replace(SMALL_LATENT, experts=replace(EXPERTS, intermediate_size=72)), 1, "experts of width 72"),
        (replace(SMALL_LATENT, experts=replace(EXPERTS, intermediate_size=16384)), 1, "experts of width 16384"),
        (replace(SMALL_LATENT, hidden_size=7168), 1, "hidden_size 7168"),
        (replace(SMALL_LATENT, experts=replace(EXPERTS, num_shared_experts=33)), 1, "33 experts of a token"),
    ],
)
def test_what_it_does_not_take_has_a_reason(shape: DecoderShape, num_ranks: int, reason: str) -> None:
    assert reason in (LatentFamily(shape, True, H100_BLOCKS, H100_LIMIT).reason_against(num_ranks) or "")
