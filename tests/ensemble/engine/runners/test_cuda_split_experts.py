"""Latent attention and experts on several ranks: over NCCL where there are so many GPUs, else over gloo."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.cuda_device import DEVICE  # isort: skip  # before triton

from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.cuda_layout import WEIGHTS_FILE, DecoderShape
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensor_file import write_tensors
from deepseek_triton.ensemble.decoder.options import ExpertOptions, LatentOptions
from deepseek_triton.ensemble.decoder.part import WHOLE, Shard
from deepseek_triton.ensemble.engine.runners.base import PromptChunk, RunnerError
from deepseek_triton.ensemble.engine.runners.cuda.parallel import ParallelRunner
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights, SplitWeights, StoredWeights
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from tests.ensemble.engine.runners.test_cuda_parallel import CPU, DTYPE, options, require, text, walk
from tests.support.checkpoints import make_checkpoint, make_tokenizer

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]

LATENT = LatentOptions(
    q_lora_rank=None, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=32, softmax_factor=1.3
)
EXPERTS = ExpertOptions(
    num_experts=12, num_experts_per_tok=3, intermediate_size=32, num_shared_experts=2, first_dense_layers=1,
    scores="softmax", choice="greedy",
)  # fmt: skip
# One query matrix and a router as V2-Lite's; two and a router as V3's.
V2 = DecoderShape(
    vocab_size=318, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=40,
    rms_norm_eps=1e-5, max_seq_len=96, latent=LATENT, experts=EXPERTS,
)  # fmt: skip
V3_EXPERTS = replace(
    EXPERTS, num_shared_experts=1, scores="sigmoid", choice="group_top2", num_groups=4, topk_group=2,
    is_normalised=True, scale=2.5,
)  # fmt: skip
V3 = replace(V2, latent=replace(LATENT, q_lora_rank=40), experts=V3_EXPERTS)
V3_FOUR = replace(V3, experts=replace(V3_EXPERTS, num_shared_experts=2))  # wide enough for four ranks


class Weights(RandomWeights):
    """The same on all ranks, for they are made on the CPU; with biases where attention may have them."""

    def __init__(self, shape: DecoderShape, *, is_fp8: bool = False) -> None:
        super().__init__(shape, is_fp8=is_fp8, has_qkv_bias=False, seed=3)
        names = frozenset(name for name in shape.linear_names() if not name.endswith("kv_b"))
        biased = frozenset(name for name in names if name.endswith((".q_kv_a", ".q_b", ".o")))
        self.entries = shape.entries(names if is_fp8 else frozenset(), biased)

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        return super().load(name, CPU, shard).to(device)


Made = CudaRunner | ParallelRunner


def one(shape: DecoderShape, **more: Any) -> CudaRunner:
    return CudaRunner(Weights(shape), shape, device=str(DEVICE), **options(**more))


def split(shape: DecoderShape, size: int, expert_size: int, **more: Any) -> ParallelRunner:
    require(max(size, expert_size))
    return ParallelRunner(
        Weights(shape), shape, size=size, expert_size=expert_size, device_type=DEVICE.type, **options(**more)
    )


def steps(runner: Made) -> list[NDArray[np.float32]]:
    """Logits of a prefill of two prompts, of a step of two of three slots, and of a step of one."""
    a, b = text(8), text(4, 1)
    logits = [runner.prefill_many([PromptChunk(2, b[:3], 0), PromptChunk(0, a[:6], 0)]).copy()]
    logits.append(runner.decode(np.array([a[6], 5, b[3]]), np.array([6, -1, 3]))[[0, 2]].copy())
    logits.append(runner.decode(a[7:], np.array([7])).copy())
    runner.close()
    return logits


def assert_near(found: list[NDArray[np.float32]], wanted: list[NDArray[np.float32]]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
        assert np.array_equal(ours.argmax(1), theirs.argmax(1)), "the greedy tokens"


SPLITS = {
    "all by their width": (V2, 2, 1),
    "whole experts alone": (V2, 1, 2),
    "heads by four, experts by two groups of two": (
        V3_FOUR,
        4,
        2,
    ),
    "four, each with whole experts": (V2, 4, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_each_split_gives_the_logits_of_one(name: str) -> None:
    shape, size, expert_size = SPLITS[name]
    with split(shape, size, expert_size) as runner:
        assert len(runner.pids) == max(size, expert_size) - 1
        found = steps(runner)
    assert_near(found, steps(one(shape)))


def test_two_ranks_give_the_logits_and_tokens_of_one() -> None:
    shape = replace(V3, num_layers=1, experts=replace(V3_EXPERTS, first_dense_layers=0))
    with split(shape, 2, 2) as runner:
        found = steps(runner)
    assert_near(found, steps(one(shape)))


@pytest.mark.slow
def test_a_pipeline_of_steps_gives_the_tokens_of_one() -> None:
    alone = one(V3)
    wanted_logits, wanted_tokens = walk(alone)
    alone.close()
    with split(V3, 2, 2) as runner:
        logits, tokens = walk(runner)
    assert_near(logits, wanted_logits)
    assert tokens == wanted_tokens


@pytest.mark.slow
def test_a_build_is_loaded_on_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(2)
    sizes: dict[str, Any] = {"intermediate_size": 128, "moe_intermediate_size": 64}
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "v3", "bfloat16", **sizes))
    settings = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "max_num_seqs": 2}
    build(
        BuildOptions(
            checkpoint, "m", tmp_path / "models", target="cuda", precision="bf16", max_seq_len=64, settings=settings
        )
    )
    assert check_repository(tmp_path / "models") == []
    directory = tmp_path / "models" / "m-engine" / "1"
    config = pbtxt.parse_text((directory.parent / "config.pbtxt").read_text(), directory)
    read = EngineSettings.from_parameters({name: value.string_value for name, value in config.parameters.items()})
    places: dict[str, Any] = {"dtype": DTYPE, "device_type": DEVICE.type}
    monkeypatch.setattr(
        "deepseek_triton.ensemble.engine.runners.cuda.parallel.ParallelRunner", partial(ParallelRunner, **places)
    )
    shape = DecoderShape.from_dict(Manifest.load(directory).engine)
    alone = CudaRunner(StoredWeights(directory / WEIGHTS_FILE), shape, device=str(DEVICE), **options())
    ids = text(6) % shape.vocab_size
    wanted = alone.prefill(0, ids, 0).copy()
    alone.close()
    _, runner = load_runner(directory, read)
    assert isinstance(runner, ParallelRunner) and len(runner.pids) == 1
    runner.set_blocks(0, 0, [1])
    np.testing.assert_allclose(runner.prefill(0, ids, 0), wanted, rtol=2e-4, atol=2e-4)
    runner.close()


def test_a_rank_reads_its_part_of_a_files_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Weights(V3_FOUR, is_fp8=True)
    whole = {name: source.load(name, CPU) for name in source.entries}
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    arrays = ((name, whole[name].view(bits[whole[name].element_size()]).numpy()) for name in source.entries)
    write_tensors(tmp_path / "weights", source.entries, arrays)
    splits = [ShardedDecoder(V3_FOUR, rank, 4, 2) for rank in range(4)]
    shards = [{name: source.load(name, CPU, of_rank.shard(name)) for name in whole} for of_rank in splits]
    monkeypatch.setattr("deepseek_triton.ensemble.engine.runners.cuda.weights.BLOCK_BYTES", 200)  # many blocks
    read_bytes = 0
    for of_rank, shard in zip(splits, shards, strict=True):
        part = SplitWeights(StoredWeights(tmp_path / "weights"), of_rank)
        for name, wanted in shard.items():
            read = part.load(name, CPU)
            assert (read.dtype, tuple(read.shape)) == (wanted.dtype, part.entries[name].shape)
            assert torch.equal(read.view(torch.uint8), wanted.view(torch.uint8)), name
            read_bytes += read.nbytes if "experts" in name and name.endswith("weight") else 0
    assert read_bytes == sum(tensor.nbytes for name, tensor in whole.items() if "experts_" in name and "weight" in name)


@pytest.mark.parametrize(
    ("size", "expert_size", "words"),
    [
        (3, 1, "tensor_parallel_size is 3: 4 heads can't be shared out evenly; this model allows 1, 2, 4"),
        (1, 5, "expert_parallel_size is 5: 12 experts can't be shared out evenly; this model allows 1, 2, 4"),
        (4, 3, "expert_parallel_size is 3: it must divide tensor_parallel_size 4; this model allows 1, 2, 4"),
        (2, 4, "expert_parallel_size is 4: it must divide tensor_parallel_size 2; this model allows 1, 2"),
        (1, 0, "expert_parallel_size is 0: it must be at least 1; this model allows 1, 2, 4"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_its_setting(size: int, expert_size: int, words: str) -> None:
    with pytest.raises(RunnerError, match=re.escape(words)):
        split(V2, size, expert_size)


def test_experts_of_no_width_that_divides_are_refused() -> None:
    options = replace(EXPERTS, intermediate_size=33)
    with pytest.raises(
        RunnerError, match="tensor_parallel_size is 2: the experts' intermediate_size 33 can't be shared"
    ):
        split(replace(V2, experts=options), 2, 1)
    narrow = replace(EXPERTS, intermediate_size=20, num_shared_experts=1)
    with pytest.raises(
        RunnerError, match="each rank's part of the shared experts is 10 wide, must be a multiple of 16"
    ):
        split(replace(V2, experts=narrow), 1, 2)
    with pytest.raises(RunnerError, match="expert_parallel_size is 2: the model has no experts; this model allows 1"):
        split(replace(V2, experts=None), 1, 2)
