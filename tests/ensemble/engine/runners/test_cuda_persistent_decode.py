"""Batch 1 in a single kernel: which decoders it takes, how it divides shared memory, and that it computes the same."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.cuda_device import DEVICE, HAS_GPU  # isort: skip  # before triton

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.engine.runners.cuda.caches import Caches
from deepseek_triton.ensemble.engine.runners.cuda.device import on_stream
from deepseek_triton.ensemble.engine.runners.cuda.layers import DecoderWeights
from deepseek_triton.ensemble.engine.runners.cuda.peer_buffers import PeerBuffers
from deepseek_triton.ensemble.engine.runners.cuda.persistent.kernel import (
    CAPABILITY,
    PersistentDecode,
    persistent_buffer_bytes,
    reason_against,
)
from deepseek_triton.ensemble.engine.runners.cuda.persistent.memory import WARPS
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights, SplitWeights
from tests.ensemble.engine.runners.test_persistent_families import DENSE_SHAPES, H100_BLOCKS, SMALL_DENSE

HAS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() >= CAPABILITY


def test_without_such_a_gpu_there_is_a_reason_against_it() -> None:
    assert reason_against(SMALL_DENSE, [True], torch.device("cpu"), torch.bfloat16) == "needs compute capability 9.0"


@pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "fp8", "dtype", "reason"),
    [
        (SMALL_DENSE, [True], torch.bfloat16, None),
        (SMALL_DENSE, [True, False], torch.bfloat16, "some matrices are FP8 and some are not"),
        (SMALL_DENSE, [True], torch.float32, "needs bfloat16"),
        (replace(SMALL_DENSE, head_dim=48), [True], torch.bfloat16, "head_dim 48"),
        (replace(SMALL_DENSE, num_heads=32, num_kv_heads=1), [True], torch.bfloat16, "32 query heads on 1 key heads"),
        (replace(SMALL_DENSE, hidden_size=32 * WARPS * H100_BLOCKS + 16), [True], torch.bfloat16, "hidden_size"),
    ],
)
def test_what_it_does_not_take_has_a_reason(
    shape: DecoderShape, fp8: list[bool], dtype: torch.dtype, reason: str | None
) -> None:
    found = reason_against(shape, fp8, DEVICE, dtype)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize("name", DENSE_SHAPES)
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.gpu
def test_it_computes_what_the_kernels_of_many_launches_do(name: str, is_fp8: bool) -> None:
    shape = DENSE_SHAPES[name]
    runner = CudaRunner(
        RandomWeights(shape, is_fp8=is_fp8, has_qkv_bias=True),
        shape,
        max_num_seqs=2,
        max_num_batched_tokens=1024,
        device="cuda",
    )
    decoder = runner._decoder
    one = decoder._persistent
    assert one is not None, "the kernel was refused"
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, 1000)
    last = torch.zeros(1, dtype=torch.int64, device="cuda")
    try:
        for position in (0, 1, 27, 28, 29, 200, 999):
            if position:
                runner.prefill(0, ids[:position], 0)
            token = torch.tensor([int(ids[position])], device="cuda")
            where = torch.tensor([position], device="cuda")
            found = []
            with on_stream(runner._stream):
                for kernel in (one, *[one] * 20, None):
                    decoder._persistent = kernel
                    logits = decoder.decode(token, where, last, runner._caches, runner._finished_splits).double()
                    cached = [
                        cache[:, 0, :, position].double() for cache in (runner._caches.keys, runner._caches.values)
                    ]
                    torch.cuda.synchronize()
                    found.append((logits, *cached))
            for again in found[1:-1]:  # a block that passes a barrier too early shows now and then
                assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True)), "not the same twice"
            for a, b in zip(found[0], found[-1], strict=True):
                # An activation that moves by a rounding changes a code by a whole step: FP8 comes no closer.
                cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
                assert cosine > (0.99 if is_fp8 else 0.99999), position
    finally:
        runner.close()


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.gpu
def test_ranks_side_by_side_compute_what_one_does(size: int, is_fp8: bool) -> None:
    """All on one GPU, each with its share of the multiprocessors, step after step."""
    shape = DENSE_SHAPES["qk norm, tied"]
    source = RandomWeights(shape, is_fp8=is_fp8, has_qkv_bias=True)
    whole = CudaRunner(source, shape, max_num_seqs=1, max_num_batched_tokens=1024)
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, 340)
    whole.prefill(0, ids[:300], 0)
    peer_buffers = [
        torch.zeros(persistent_buffer_bytes(shape, size) // 8, dtype=torch.int64, device="cuda") for _ in range(size)
    ]
    addresses = torch.tensor([buffer.data_ptr() for buffer in peer_buffers], device="cuda")
    given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    ranks: list[PersistentDecode] = []
    streams: list[Any] = [torch.cuda.Stream() for _ in range(size)]  # type: ignore[no-untyped-call]
    for rank in range(size):
        split = ShardedDecoder(shape, rank, size)
        weights = DecoderWeights.load(split.shape, SplitWeights(source, split), DEVICE, torch.bfloat16, split)
        heads = slice(rank * split.shape.num_kv_heads, (rank + 1) * split.shape.num_kv_heads)
        caches = Caches(*(cache[:, :, heads].contiguous() for cache in (whole._caches.keys, whole._caches.values)))
        ranks.append(
            PersistentDecode(
                split.shape, weights, caches,
                peer_buffers=PeerBuffers(rank, size, addresses, given_up), blocks=H100_BLOCKS // size,
            )
        )  # fmt: skip
    last = torch.zeros(1, dtype=torch.int64, device="cuda")
    try:
        for position in range(300, 340):
            token, where = (torch.tensor([value], device="cuda") for value in (int(ids[position]), position))
            torch.cuda.synchronize()
            parts = []
            for kernel, stream in zip(ranks, streams, strict=True):
                with torch.cuda.stream(stream):
                    parts.append(kernel(token, where, last))
            deadline = time.monotonic() + 10
            while not all(stream.query() for stream in streams):
                if time.monotonic() > deadline:
                    given_up[0] = 1
                    pytest.fail("the ranks wait for each other")
            found = torch.cat([part[0] for part in parts])[: shape.vocab_size].double()
            wanted = torch.from_numpy(whole.decode(ids[position : position + 1], np.array([position]))[0]).double()
            cosine = torch.nn.functional.cosine_similarity(found.cpu(), wanted, dim=0).item()
            assert cosine > (0.99 if is_fp8 else 0.99999), position
    finally:
        whole.close()


@pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.gpu
def test_a_rank_whose_others_are_gone_can_be_told_not_to_wait() -> None:
    shape = DENSE_SHAPES["qk norm, tied"]
    source, split = RandomWeights(shape, is_fp8=True, has_qkv_bias=True), ShardedDecoder(shape, 0, 2)
    weights = DecoderWeights.load(split.shape, SplitWeights(source, split), DEVICE, torch.bfloat16, split)
    own = split.shape
    size = (own.num_layers, 1, own.num_kv_heads, own.max_seq_len, own.head_dim)
    caches = Caches(*(torch.zeros(size, dtype=torch.bfloat16, device="cuda") for _ in range(2)))
    peer_buffers = [
        torch.zeros(persistent_buffer_bytes(shape, 2) // 8, dtype=torch.int64, device="cuda") for _ in range(2)
    ]
    given_up = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    addresses = torch.tensor([buffer.data_ptr() for buffer in peer_buffers], device="cuda")
    kernel = PersistentDecode(own, weights, caches, peer_buffers=PeerBuffers(0, 2, addresses, given_up))
    zero = torch.zeros(1, dtype=torch.int64, device="cuda")
    done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    kernel(zero, zero, zero)
    done.record()
    time.sleep(0.5)
    assert not done.query(), "it didn't wait"
    given_up[0] = 1
    deadline = time.monotonic() + 10
    while not done.query():
        assert time.monotonic() < deadline, "it still waits"
