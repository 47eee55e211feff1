"""The persistent kernels' sources, thread for thread on the CPU: that they compute a decoder needs no GPU."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.options import ExpertOptions, LatentOptions
from deepseek_triton.ensemble.engine.runners.cuda.persistent.dense import DenseFamily
from deepseek_triton.ensemble.engine.runners.cuda.persistent.family import Family
from deepseek_triton.ensemble.engine.runners.cuda.persistent.latent import LatentFamily
from tests.support.persistent_host import COMPILER, HostKernel
from tests.support.plain_decoder import logits, random_weights

pytestmark = [
    pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs a C++ compiler for x86-64"),
    pytest.mark.slow,
    pytest.mark.xdist_group("persistent kernels"),
]
KernelOf = Callable[..., tuple[HostKernel, object]]
BLOCKS, LIMIT = 3, 232448
PAGE = 64
DENSE = DecoderShape(
    vocab_size=130, hidden_size=128, intermediate_size=272, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
    rms_norm_eps=1e-5, max_seq_len=192,
)  # fmt: skip
LATENT = LatentOptions(
    q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, softmax_factor=1.3
)
EXPERTS = ExpertOptions(
    num_experts=8, num_experts_per_tok=3, intermediate_size=48, num_shared_experts=2, first_dense_layers=1,
    scores="softmax", choice="greedy",
)  # fmt: skip
V2 = replace(DENSE, num_kv_heads=4, head_dim=48, latent=LATENT, experts=EXPERTS)
MANY_HEADS = replace(V2, num_heads=16, num_kv_heads=16, num_layers=1, experts=replace(EXPERTS, first_dense_layers=0))
WIDE = replace(V2, hidden_size=2064, num_layers=1, experts=replace(EXPERTS, first_dense_layers=0))
SIGMOID = replace(EXPERTS, scores="sigmoid", choice="group_top2", is_normalised=True, scale=2.5)
# A stage has four of these rows; a part of them, as an expert's row, is an odd number of tiles.
IN_PARTS = replace(DENSE, hidden_size=1152, num_layers=1)
ODD_EXPERTS = replace(V2, hidden_size=384, num_layers=2, experts=replace(EXPERTS, intermediate_size=384))
SHAPES = {
    "dense": DENSE,
    "dense, rows in two parts": IN_PARTS,
    "dense, normed q and k, rows of several stages": replace(DENSE, qk_norm=True, intermediate_size=4608, num_layers=1),
    "latent and experts": V2,
    "latent and experts, odd numbers of tiles": ODD_EXPERTS,
    "latent and experts, a stage for one row of the router": WIDE,
    "an odd number of experts, sigmoid, normalised": replace(
        V2, experts=replace(SIGMOID, num_experts=7, num_shared_experts=0, first_dense_layers=0)
    ),
}


def blocks_of(shape: DecoderShape) -> int:
    """Few, but enough for wide rows; for many heads as many as they have groups."""
    if shape.num_heads == MANY_HEADS.num_heads:
        return 4
    return 15 if shape == WIDE else 9 if shape.hidden_size > 256 else BLOCKS


@pytest.fixture(scope="module")
def kernel_of(tmp_path_factory: pytest.TempPathFactory) -> KernelOf:
    """Kernels by shape, compiled once, and their weights; in bfloat16 with blocks, in codes with slots."""

    @cache
    def make(shape: DecoderShape, is_fp8: bool = False, stages: int = 0) -> tuple[HostKernel, object]:
        kind: type[Family] = DenseFamily if shape.latent is None else LatentFamily
        family = kind(shape, is_fp8, blocks_of(shape), LIMIT)
        if stages:
            memory = family.memory
            limit = memory.total - (memory.stages - stages) * (memory.stage_bytes + 16)
            family = replace(family, shared_limit=limit)
            assert family.memory.stages == stages
        assert family.reason_against(1) is None
        weights = random_weights(shape, is_fp8=is_fp8, has_bias=True)
        heads, width = (shape.num_kv_heads, shape.head_dim) if shape.latent is None else (1, 144)
        blocks = shape.max_seq_len // PAGE
        size = (1, heads, shape.max_seq_len, width) if is_fp8 else (blocks + 1, heads, PAGE, width)
        keys, values = (torch.full((shape.num_layers, *size), torch.nan, dtype=torch.bfloat16) for _ in range(2))
        table = None if is_fp8 else torch.arange(blocks, 0, -1, dtype=torch.int32)
        folder = tmp_path_factory.mktemp("kernel")
        return HostKernel(family, weights, keys, values if shape.latent is None else keys, folder, table), weights

    return make


def worst_cosine(shape: DecoderShape, kernel: HostKernel, weights: object, num_tokens: int, slow: int = -1) -> float:
    """Of a text's logits, token after token, with those of the whole text."""
    ids = torch.randint(0, shape.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(1))
    wanted = logits(shape, weights, ids)
    found = [kernel(int(token), position, seed=position, slow=slow) for position, token in enumerate(ids)]
    return float(torch.nn.functional.cosine_similarity(torch.stack(found), wanted, dim=1).min())


@pytest.mark.parametrize("name", SHAPES)
def test_it_computes_the_decoder(name: str, kernel_of: KernelOf) -> None:
    kernel, weights = kernel_of(SHAPES[name])
    tokens = 4 if "dense" in name or "tiles" in name or "router" in name else 15  # latent attention reads 14 at a time
    assert worst_cosine(SHAPES[name], kernel, weights, tokens) > 0.9995


@pytest.mark.parametrize(
    "shape",
    [DENSE, replace(IN_PARTS, hidden_size=2304), V2, ODD_EXPERTS],
    ids=["dense", "dense, rows in two parts", "latent", "latent, odd numbers of tiles"],
)
def test_it_computes_in_codes(shape: DecoderShape, kernel_of: KernelOf) -> None:
    kernel, weights = kernel_of(shape, is_fp8=True)
    assert worst_cosine(shape, kernel, weights, 2) > 0.99


def test_heads_attend_in_groups_which_grow_with_the_text(kernel_of: KernelOf) -> None:
    """Four groups of a block with four heads each, and two of two with eight from the fifth unit of 14 positions on."""
    kernel, weights = kernel_of(MANY_HEADS)
    assert worst_cosine(MANY_HEADS, kernel, weights, 72) > 0.9995


@pytest.mark.parametrize("stages", [4, 5])
@pytest.mark.parametrize("shape", [DENSE, V2], ids=["dense", "latent"])
def test_a_ring_of_few_stages_computes_the_same(shape: DecoderShape, stages: int, kernel_of: KernelOf) -> None:
    """Warpgroups take stages in turn: none may take what lay in a stage's place a lap before for the stage."""
    few, _ = kernel_of(shape, stages=stages)
    many, _ = kernel_of(shape)
    for position in range(3):
        wanted = many(7, position)
        assert all(torch.equal(few(7, position, seed=seed), wanted) for seed in range(4)), position


DEEP = replace(V2, num_layers=5)


@pytest.mark.parametrize(
    "shape",
    [DENSE, *(replace(DEEP, experts=replace(EXPERTS, first_dense_layers=num)) for num in (0, 1, 2, 3))],
    ids=["dense", *(f"latent, {num} dense layers" for num in (0, 1, 2, 3))],
)
def test_nobody_takes_what_a_slow_block_wrote_before_for_what_it_is_writing(
    shape: DecoderShape, kernel_of: KernelOf
) -> None:
    kernel, _ = kernel_of(shape)
    kernel(5, 0)
    wanted = kernel(7, 1)
    for slow in range(BLOCKS):
        kernel(9, 2)
        assert torch.equal(kernel(7, 1, seed=slow, slow=slow), wanted), slow


def test_nobody_takes_a_split_of_an_earlier_text_for_a_new_one(kernel_of: KernelOf) -> None:
    """A block has a split where a text is long enough; what it wrote then stays until it has one again."""
    kernel, _ = kernel_of(V2)
    for position in range(14):
        kernel(position, position)
    wanted = kernel(7, 14)
    for times in range(3):
        kernel(9, 14)
        for _ in range(times):
            kernel(0, 0)
        assert torch.equal(kernel(7, 14, seed=times, slow=1), wanted), times
