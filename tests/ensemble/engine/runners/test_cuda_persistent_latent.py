"""Latent attention and experts at batch 1 in a single kernel: which decoders it takes; that it computes the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.cuda_device import DEVICE, HAS_GPU  # isort: skip  # before triton

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.engine.runners.cuda.device import on_stream
from deepseek_triton.ensemble.engine.runners.cuda.latent import FEW_ROWS, MANY_HEADS, MANY_ROWS
from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm
from deepseek_triton.ensemble.engine.runners.cuda.persistent.kernel import CAPABILITY, reason_against
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights
from deepseek_triton.ensemble.protocol.settings import KvCache
from tests.ensemble.engine.runners.test_persistent_families import H100_LIMIT, LATENT_SHAPES, LITE, SMALL_LATENT

HAS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() >= CAPABILITY
needs_hopper = pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")
CHUNK = 256  # tokens of a prefill


def test_attention_reads_as_far_ahead_as_shared_memory_has_room() -> None:
    """Triton keeps a whole slot's blocks of entries in shared memory while it reads ahead."""
    entry_bytes = 2 * (512 + 64)
    assert FEW_ROWS.fitting(entry_bytes, H100_LIMIT).num_stages == 3
    assert MANY_ROWS.fitting(entry_bytes, H100_LIMIT) == MANY_ROWS
    assert MANY_HEADS.fitting(entry_bytes, H100_LIMIT) == MANY_HEADS
    assert FEW_ROWS.fitting(entry_bytes, 2**16).num_stages == 1


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["slots", "pages"])
@pytest.mark.parametrize("name", LATENT_SHAPES)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_it_computes_what_the_kernels_of_many_launches_do(name: str, is_fp8: bool, kind: KvCache) -> None:
    agrees(LATENT_SHAPES[name], (0, 1, 13, 14, 15, 200, 999), is_fp8=is_fp8, kind=kind)


@needs_hopper
@pytest.mark.gpu
def test_a_long_text_has_a_split_on_every_multiprocessor() -> None:
    agrees(replace(SMALL_LATENT, max_seq_len=8192), (7166, 7167, 7168, 8191), is_fp8=False, kind="pages")


@needs_hopper
@pytest.mark.gpu
def test_the_runner_uses_it() -> None:
    assert reason_against(LITE, [True], DEVICE, torch.bfloat16) is None


def agrees(shape: DecoderShape, positions: tuple[int, ...], *, is_fp8: bool, kind: KvCache) -> None:
    """Check that logits and cached entries are those of the kernels of many launches."""
    runner = CudaRunner(
        RandomWeights(shape, is_fp8=is_fp8, has_qkv_bias=False), shape,
        max_num_seqs=1, max_num_batched_tokens=CHUNK, cache_form=CacheForm(kind), device="cuda",
    )  # fmt: skip
    decoder = runner._decoder
    one = decoder._persistent
    assert one is not None, "the kernel was refused"
    if kind == "pages":
        runner.set_blocks(0, 0, [*range(runner.num_blocks, 0, -1)])
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, shape.max_seq_len)
    last = torch.zeros(1, dtype=torch.int64, device="cuda")
    cosines: dict[int, float] = {}
    try:
        for position in positions:
            for start in range(0, position, CHUNK):
                runner.prefill(0, ids[start : min(start + CHUNK, position)], start)
            token, where = (torch.tensor([value], device="cuda") for value in (int(ids[position]), position))
            found = []
            with on_stream(runner._stream):
                for kernel in (one, *[one] * 20, None):
                    decoder._persistent = kernel
                    logits = decoder.decode(token, where, last, runner._caches, runner._finished_splits).double()
                    found.append((logits, runner._caches.keys.clone()))
                torch.cuda.synchronize()
            for again in found[1:-1]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True)), "not the same twice"
            cosines[position] = min(
                torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()
                for a, b in zip(found[0], found[-1], strict=True)
            )
    finally:
        runner.close()
    # An activation that moves by a rounding changes a code by a whole step. It may also change an expert, where two are
    # equally good: for one of the tokens.
    least, *others = sorted(cosines.values())
    assert least > 0.95 and min(others) > (0.98 if is_fp8 else 0.999), cosines
