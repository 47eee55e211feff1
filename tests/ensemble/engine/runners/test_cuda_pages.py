"""The cuda runner on pages: the bits of slots, an engine that runs out of memory, INT8, and how much room there is."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.cuda_device import DEVICE, DTYPE, HAS_GPU, no_more_memory  # isort: skip  # before triton

from benchmarks.cuda_reference import Reference
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.part import WHOLE, Shard
from deepseek_triton.ensemble.engine.runners.base import PagedRunner, PromptChunk, RunnerError
from deepseek_triton.ensemble.engine.runners.cuda.memory import blocks_that_fit
from deepseek_triton.ensemble.engine.runners.cuda.pages import CHANGES, CacheForm, TableChanges, describe_room
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights
from tests.ensemble.engine.test_engine import Engine

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]

# On a GPU a head of 64, which the persistent kernel of batch 1 can read.
SHAPE = DecoderShape(
    vocab_size=320, hidden_size=64, intermediate_size=112, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=64 if HAS_GPU else 16, rms_norm_eps=1e-5, max_seq_len=150,
)  # fmt: skip


class Drawn(RandomWeights):
    """Made on `DEVICE`, so that all readers get the same."""

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        return super().load(name, DEVICE, shard).to(device)


def make(kind: Any = "pages", *, max_num_seqs: int = 3, tokens: int = 0, **more: Any) -> CudaRunner:
    options: dict[str, Any] = {"dtype": DTYPE, "device": str(DEVICE), "max_num_batched_tokens": 128, **more}
    source = Drawn(SHAPE, is_fp8=True, has_qkv_bias=True)
    return CudaRunner(source, SHAPE, max_num_seqs=max_num_seqs, cache_form=CacheForm(kind, tokens), **options)


def give_blocks(runner: CudaRunner) -> None:
    """Every slot gets its blocks, in a wild order."""
    if runner.num_blocks:
        blocks = np.random.default_rng(1).permutation(runner.num_blocks) + 1
        for slot, part in enumerate(np.array_split(blocks, runner.max_num_seqs)):
            runner.set_blocks(slot, 0, part.tolist())


def run(runner: CudaRunner) -> list[np.ndarray[Any, Any]]:
    """Logits of packed chunks over a block's end, of a batch, and of batch 1."""
    give_blocks(runner)
    ids = np.random.default_rng(0).integers(0, SHAPE.vocab_size, 150)
    found = [runner.prefill_many([PromptChunk(2, ids[:5], 0), PromptChunk(0, ids[:63], 0)]).copy()]
    found.append(runner.prefill_many([PromptChunk(0, ids[63:70], 63)]).copy())
    idle = -1 if runner.num_blocks else SHAPE.max_seq_len - 1
    found.append(runner.decode(np.array([ids[70], 0, ids[5]]), np.array([70, idle, 5]))[[0, 2]].copy())
    found.append(runner.decode(ids[71:72], np.array([71])).copy())
    return found


@pytest.mark.slow
def test_pages_give_the_bits_that_slots_give() -> None:
    slots, pages = make("slots"), make("pages")
    assert isinstance(pages, PagedRunner) and pages.num_blocks == 9 and not slots.num_blocks
    for wanted, found in zip(run(slots), run(pages), strict=True):
        np.testing.assert_array_equal(found, wanted)
    slots.close()
    pages.close()


@pytest.mark.slow
def test_pages_of_codes_are_near() -> None:
    runner, reference = make("pages-int8"), Reference(SHAPE, Drawn(SHAPE, is_fp8=True, has_qkv_bias=True))
    wanted = reference.logits(np.random.default_rng(0).integers(0, SHAPE.vocab_size, 150).tolist())
    packed, chunk, batch, one = run(runner)
    for logits, position in ((packed[1], 62), (chunk[0], 69), (batch[0], 70), (one[0], 71), (packed[0], 4)):
        a, b = torch.from_numpy(logits).double(), wanted[position].cpu()
        assert float(a @ b / a.norm() / b.norm()) > 0.97, position
    assert runner.cache_bytes < 0.6 * (2 * SHAPE.num_layers * 10 * 64 * SHAPE.num_kv_heads * SHAPE.head_dim * 2) + 4096
    runner.close()


@pytest.mark.slow
def test_an_engine_that_runs_out_of_blocks_gives_everybody_the_tokens_that_each_has_alone() -> None:
    prompts = [np.random.default_rng(seed).integers(1, SHAPE.vocab_size, 60).tolist() for seed in range(2)]
    found = []
    for tokens in (0, 3 * 64):
        engine = Engine(make(tokens=tokens, max_num_seqs=2), 128, ())  # type: ignore[arg-type]
        sinks = [engine.submit(prompt, max_tokens=6) for prompt in prompts]
        engine.run()
        assert (engine.loop.metrics.preemptions_total > 0) == (tokens > 0)
        assert engine.loop.metrics.requests_failed_total == 0
        found.append([sink.ids for sink in sinks])
        engine.runner.close()
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["pages", "pages-int8"])
def test_a_step_asks_for_no_memory(kind: str) -> None:
    runner = make(kind)
    run(runner)
    with no_more_memory():
        run(runner)
    runner.close()


def test_a_context_that_does_not_fit_is_lowered() -> None:
    runner = make(tokens=64)
    assert runner.max_seq_len == 64 and runner.num_blocks == 1
    with pytest.raises(RunnerError, match="a slot holds 64"):
        runner.prefill(0, np.zeros(65, np.int64), 0)
    runner.close()


def test_tables_change_in_the_order_of_the_calls() -> None:
    table = torch.zeros(3, 2 * CHANGES, dtype=torch.int32, device=DEVICE)
    changes = TableChanges(table)
    changes.copy()
    changes.set(1, 0, range(1, 2 * CHANGES + 1))
    changes.set(1, 5, [77, 78])
    changes.set(2, 1, [9])
    changes.copy()
    wanted = torch.zeros_like(table)
    wanted[1] = torch.arange(1, 2 * CHANGES + 1)
    wanted[1, 5:7] = torch.tensor([77, 78])
    wanted[2, 1] = 9
    assert torch.equal(table, wanted)


def test_room_is_told_in_sequences() -> None:
    assert describe_room(412_032, 32768, 256) == ("room for 412,032 tokens: 12 sequences of 32,768 or 201 of 2,048")
    assert describe_room(412_032, 32768, 64).endswith("12 sequences of 32,768 or 64 of 2,048")
    assert describe_room(6400, 1000, 64) == "room for 6,400 tokens: 6 sequences of 1,000"


def test_blocks_fill_what_is_left_and_codes_are_half_as_large() -> None:
    shape = replace(SHAPE, head_dim=128)
    assert CacheForm("pages").block_bytes(shape, 2) == 2 * 2 * 64 * 128 * 2
    assert CacheForm("pages-int8").block_bytes(shape, 2) == 2 * 2 * 64 * 130
    assert blocks_that_fit(100, 200, block_bytes=10, free=1000, most=500) == 69
    assert blocks_that_fit(100, 200, block_bytes=10, free=1000, most=50) == 50
    with pytest.raises(RunnerError, match="leave nothing for the cache"):
        blocks_that_fit(100, 200, block_bytes=10, free=319, most=50)
