"""Random small decoders: the sources on the CPU agree with the plain decoder, in any order of blocks."""

from __future__ import annotations

import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.options import Choice, ExpertOptions, LatentOptions
from deepseek_triton.ensemble.engine.runners.cuda.persistent.dense import DenseFamily
from deepseek_triton.ensemble.engine.runners.cuda.persistent.latent import LatentFamily
from tests.support.persistent_host import COMPILER, HostKernel
from tests.support.plain_decoder import logits, random_weights

pytestmark = pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs C++ for x86-64")
CHOICES: tuple[Choice, ...] = ("greedy", "group_top2")
LIMIT, LENGTH, TOKENS = 232448, 16, 15  # latent attention reads 14 positions at a time


@st.composite
def shapes(draw: st.DrawFn, is_latent: bool) -> DecoderShape:
    def size(step: int, most: int) -> int:
        return step * draw(st.integers(1, most))

    keys = 1 if is_latent else draw(st.sampled_from([1, 2, 3]))
    shape = DecoderShape(
        draw(st.integers(1, 200)), size(16, 12), size(16, 24), 2, keys * draw(st.integers(1, 4)), keys,
        draw(st.sampled_from([32, 64])), 1e-5, LENGTH, qk_norm=draw(st.booleans()))  # fmt: skip
    latent = LatentOptions(None, draw(st.sampled_from([128, 256])), size(8, 4), size(16, 2), size(16, 2))
    experts, choice = draw(st.integers(2, 9)), draw(st.sampled_from(CHOICES))
    options = ExpertOptions(
        experts, draw(st.integers(1, min(4, experts))), size(16, 4), draw(st.integers(0, 3)), draw(st.integers(0, 1)),
        draw(st.sampled_from(["softmax", "sigmoid"])), choice, is_normalised=draw(st.booleans()))  # fmt: skip
    return replace(shape, num_kv_heads=shape.num_heads, latent=latent, experts=options) if is_latent else shape


@pytest.mark.parametrize("is_latent", [False, True], ids=["dense", "latent"])
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data(), blocks=st.integers(2, 4), seed=st.integers(0, 1000))
def test_any_decoder(is_latent: bool, data: st.DataObject, blocks: int, seed: int) -> None:
    shape = data.draw(shapes(is_latent))
    family = (LatentFamily if is_latent else DenseFamily)(shape, False, blocks, LIMIT)
    assume(family.reason_against(1) is None)
    weights = random_weights(shape, is_fp8=False, has_bias=True, seed=seed)
    width = shape.head_dim if shape.latent is None else shape.latent.kv_lora_rank + shape.latent.qk_rope_head_dim
    size = (2, 2, 1, 1 if is_latent else shape.num_kv_heads, LENGTH, width)
    keys, values = torch.full(size, torch.nan, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        kernel = HostKernel(family, weights, keys, keys if is_latent else values, Path(folder))
        ids = torch.randint(0, shape.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed))
        found = [kernel(int(token), position, seed=seed + position) for position, token in enumerate(ids)]
        again = kernel(int(ids[-1]), TOKENS - 1, seed=seed, slow=seed % blocks)
    wanted = logits(shape, weights, ids)
    assert torch.equal(again, found[-1])
    errors = (torch.stack(found) - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.median() < 0.01  # a token whose experts' scores are nearly alike may choose others
