"""One decoder on several ranks: over NCCL where there are so many GPUs, else over gloo under Triton's interpreter."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.cuda_device import DEVICE, HAS_GPU, no_more_memory  # isort: skip  # before triton

from benchmarks.cuda_reference import Reference
from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry, write_tensors
from deepseek_triton.ensemble.decoder.part import WHOLE, Shard
from deepseek_triton.ensemble.engine.runners.base import (
    LAST_TOKEN,
    DeviceSampling,
    PipelinedRunner,
    PromptChunk,
    RunnerError,
    SamplingRunner,
)
from deepseek_triton.ensemble.engine.runners.cuda.memory import check_fits, weight_bytes
from deepseek_triton.ensemble.engine.runners.cuda.parallel import ParallelRunner
from deepseek_triton.ensemble.engine.runners.cuda.ranks import WORKER
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights, SplitWeights, StoredWeights
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.processes.child import python_path
from deepseek_triton.ensemble.processes.stat import stat_fields
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.support.checkpoints import make_checkpoint, make_tokenizer

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]

GPUS = torch.cuda.device_count()
CPU = torch.device("cpu")
# float32 on a GPU too: what the ranks do differently shows against the rounding of sums alone.
DTYPE = torch.float32
SHAPE = DecoderShape(
    vocab_size=318, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=12, num_kv_heads=2, head_dim=16,
    rms_norm_eps=1e-5, max_seq_len=96,
)  # fmt: skip
SHAPES = {
    2: SHAPE,  # a key head for each rank
    3: replace(SHAPE, num_kv_heads=3, tie_word_embeddings=True, qk_norm=True, vocab_size=320),  # a padded, tied head
    4: SHAPE,  # two ranks share a key head
}
GREEDY = DeviceSampling(0.0, 0, 1.0, 0.0, 0, 0)
WARM = DeviceSampling(0.9, 0, 1.0, 0.0, 3, 0)
Ids = NDArray[np.int64]


class Biased(RandomWeights):
    """Random weights with a bias on every matrix; the same on all ranks, for they are made on the CPU."""

    def __init__(self, shape: DecoderShape, *, is_fp8: bool) -> None:
        super().__init__(shape, is_fp8=is_fp8, has_qkv_bias=True)
        names = frozenset(shape.linear_names())
        self.entries = shape.entries(names if is_fp8 else frozenset(), names)

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        return super().load(name, CPU, shard).to(device)


@dataclass
class Spoilt:
    """A source that can't be read by any process but the one that made it."""

    entries: dict[str, TensorEntry]
    pid: int

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        if os.getpid() != self.pid:
            raise RunnerError("the GPU has 3 MiB free")
        return torch.zeros(shard.shape(self.entries[name].shape), device=device)


def require(size: int) -> None:
    if HAS_GPU and size > GPUS:
        pytest.skip(f"needs {size} NVIDIA GPUs, there are {GPUS}")


def options(**more: Any) -> dict[str, Any]:
    return {"max_num_seqs": 3, "max_num_batched_tokens": 64, "dtype": DTYPE, **more}


def parallel(size: int, source: Any = None, **more: Any) -> ParallelRunner:
    require(size)
    shape = SHAPES[size]
    given = Biased(shape, is_fp8=False) if source is None else source
    return ParallelRunner(given, shape, size=size, device_type=DEVICE.type, **options(**more))


def text(length: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, SHAPE.vocab_size, length)


def is_alive(pid: int) -> bool:
    try:
        return stat_fields(pid)[0] not in "ZX"
    except OSError:
        return False


def wait_until_dead(pids: list[int], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"of {pids} some live"
        time.sleep(0.05)


def reported_failure(failures: list[str], seconds: float = 20.0) -> str:
    """The one failure that on_failure got: after the call that failed, in a thread of its own."""
    deadline = time.monotonic() + seconds
    while not failures and time.monotonic() < deadline:
        time.sleep(0.05)
    (failure,) = failures
    return failure


# ---- what belongs to whom


@pytest.mark.parametrize("size", SHAPES)
def test_the_parts_are_the_whole(size: int) -> None:
    shape = SHAPES[size]
    source = Biased(shape, is_fp8=True)
    splits = [ShardedDecoder(shape, rank, size) for rank in range(size)]
    parts = [SplitWeights(source, split) for split in splits]
    d, q, kv = shape.head_dim, shape.q_size, shape.kv_size
    for name in source.entries:
        whole = source.load(name, CPU).float()
        loaded = [part.load(name, CPU).float() for part in parts]
        assert [tuple(tensor.shape) for tensor in loaded] == [part.entries[name].shape for part in parts]
        group, _, kind = name.rpartition(".")
        if name.endswith(("o.weight", "down.weight")):
            assert torch.equal(torch.cat(loaded, 1), whole), name
        elif group.endswith("qkv"):
            queries = torch.cat([tensor[: q // size] for tensor in loaded])
            assert torch.equal(queries, whole[:q]), name
            for rank, (split, tensor) in enumerate(zip(splits, loaded, strict=True)):
                own = split.shape
                head = rank * own.num_heads // (shape.num_heads // shape.num_kv_heads)  # what its queries look at
                keys = slice(q + head * d, q + (head + own.num_kv_heads) * d)
                assert torch.equal(tensor[own.q_size : own.q_size + own.kv_size], whole[keys]), name
                values = slice(keys.start + kv, keys.stop + kv)
                assert torch.equal(tensor[own.q_size + own.kv_size :], whole[values]), name
        elif group.endswith("gate_up"):
            halves = [tensor.chunk(2) for tensor in loaded]
            assert torch.equal(torch.cat([*(h[0] for h in halves), *(h[1] for h in halves)]), whole), name
        elif name == "head":
            assert torch.equal(torch.cat(loaded), whole)
        else:
            assert all(torch.equal(tensor, whole) for tensor in loaded), (name, kind)
    fewest = sum(entry.num_bytes for entry in source.entries.values()) / size
    assert all(sum(entry.num_bytes for entry in part.entries.values()) >= fewest for part in parts)


def test_a_rank_reads_its_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Biased(SHAPE, is_fp8=True)
    whole = {name: source.load(name, CPU) for name in source.entries}

    def array(name: str) -> NDArray[Any]:
        """The tensor's bits, as NumPy has them."""
        tensor = whole[name]
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
        values: NDArray[Any] = tensor.view(bits).numpy()
        return values

    write_tensors(tmp_path / "weights", source.entries, ((name, array(name)) for name in source.entries))
    monkeypatch.setattr("deepseek_triton.ensemble.engine.runners.cuda.weights.BLOCK_BYTES", 200)  # many blocks
    stored = StoredWeights(tmp_path / "weights")
    for rank in range(4):
        split = ShardedDecoder(SHAPE, rank, 4)
        part = SplitWeights(stored, split)
        for name, tensor in whole.items():
            shard, read = split.shard(name), part.load(name, CPU)
            wanted = tensor if shard.rows is None else torch.cat([tensor[rows] for rows in shard.rows])
            wanted = wanted if shard.columns is None else wanted[:, shard.columns].contiguous()
            assert (read.dtype, read.shape) == (wanted.dtype, wanted.shape)
            assert torch.equal(read.view(torch.uint8), wanted.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({}, 5, "5: 12 query heads can't be shared out evenly; this model allows 1, 2, 4, 6, 12"),
        ({"num_kv_heads": 3}, 2, "2: 3 key heads can't be shared out evenly; this model allows 1, 3, 6, 12"),
        ({"intermediate_size": 194}, 4, "4: intermediate_size 194 can't be shared out evenly; this model allows 1"),
        ({"intermediate_size": 112}, 2, "2: each rank's part of intermediate_size is 56, must be a multiple of 16"),
        ({}, 0, "0: it must be at least 1"),
    ],
)
def test_what_cannot_be_split_evenly_is_refused(changes: dict[str, int], size: int, words: str) -> None:
    shape = replace(SHAPE, **changes)  # type: ignore[arg-type]
    with pytest.raises(LayoutError, match=f"tensor_parallel_size is {words}"):
        ShardedDecoder(shape, 0, size)
    with pytest.raises(RunnerError, match=f"tensor_parallel_size is {words}"):
        ParallelRunner(Biased(shape, is_fp8=False), shape, size=size, max_num_seqs=1, max_num_batched_tokens=8)


@pytest.mark.skipif(GPUS > 3, reason="this machine has them")
def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(RunnerError, match=f"tensor_parallel_size is 4, torch sees {GPUS} NVIDIA GPUs here; lower it"):
        ParallelRunner(Biased(SHAPE, is_fp8=False), SHAPE, size=4, max_num_seqs=1, max_num_batched_tokens=8)


def test_the_interpreter_is_found_where_it_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(python_path()).samefile(sys.executable)
    monkeypatch.setattr(sys, "executable", "/opt/tritonserver/backends/python/triton_python_backend_stub")
    assert Path(python_path()).samefile(Path(sys.prefix) / "bin" / "python3")


# ---- what is computed


@pytest.fixture(params=SHAPES)
def ranks(request: pytest.FixtureRequest) -> Iterator[tuple[int, ParallelRunner]]:
    with parallel(request.param) as made:
        yield request.param, made


def alone(size: int, **more: Any) -> CudaRunner:
    return CudaRunner(Biased(SHAPES[size], is_fp8=False), SHAPES[size], device=str(DEVICE), **options(**more))


def walk(runner: CudaRunner | ParallelRunner) -> tuple[list[NDArray[np.float32]], list[int]]:
    """Logits of every kind of call, and the tokens of a pipeline of steps that are begun ahead."""
    a, b = text(20), text(11, 1)
    logits = [runner.prefill_many([PromptChunk(2, b[:6], 0), PromptChunk(0, a[:17], 0)]).copy()]
    logits.append(runner.prefill(2, b[6:10], 6)[None].copy())
    logits.append(runner.decode(np.array([a[17], 5, b[10]]), np.array([17, -1, 10]))[[0, 2]].copy())
    logits.append(runner.decode(a[18:19], np.array([18])).copy())
    runner.copy_prefix(0, 1, 15)
    logits.append(runner.prefill(1, a[15:19], 15)[None].copy())
    runner.start_prefill([PromptChunk(1, a, 0), PromptChunk(0, b, 0)], [GREEDY, WARM], [1])
    tokens = []
    for step in range(4):
        position = np.array([11 + step, 20 + step])
        runner.start_decode(
            np.array([LAST_TOKEN] * 2), position, [replace(WARM, step=step + 1), replace(GREEDY, step=step + 1)], []
        )
        if step == 0:
            first = runner.finish_prefill()
            tokens += first.tokens.tolist()
            logits.append(first.logits.copy())
        else:
            tokens += runner.finish_decode().tokens.tolist()
    runner.abandon()
    return logits, tokens


def test_several_ranks_give_the_logits_and_tokens_of_one(ranks: tuple[int, ParallelRunner]) -> None:
    size, runner = ranks
    assert isinstance(runner, SamplingRunner) and isinstance(runner, PipelinedRunner)
    assert len(runner.pids) == size - 1
    one = alone(size)
    wanted_logits, wanted_tokens = walk(one)
    one.close()
    logits, tokens = walk(runner)
    for found, wanted in zip(logits, wanted_logits, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)
    assert tokens == wanted_tokens
    first, second = (runner.prefill(0, text(9), 0).copy() for _ in range(2))
    np.testing.assert_array_equal(first, second, "a second time the same bits")


def test_what_is_refused_leaves_the_ranks_in_step(ranks: tuple[int, ParallelRunner]) -> None:
    size, runner = ranks
    before = runner.prefill(0, text(5), 0).copy()
    for call, words in (
        (lambda: runner.prefill(0, np.zeros(65, np.int64), 0), "65 prompt tokens"),
        (lambda: runner.decode(np.zeros(4, np.int64), np.zeros(4, np.int64)), "4 rows"),
        (runner.finish_decode, "no decode step was begun"),
        (runner.finish_prefill, "no prefill was begun"),
    ):
        with pytest.raises(RunnerError, match=words):
            call()
    for _ in range(2):
        runner.start_decode(np.array([1]), np.array([5]), [GREEDY], [])
    with pytest.raises(RunnerError, match="2 steps are in flight"):
        runner.start_decode(np.array([1]), np.array([5]), [GREEDY], [])
    runner.abandon()
    np.testing.assert_array_equal(runner.prefill(0, text(5), 0), before)
    assert len(runner.pids) == size - 1


def test_one_process_runs_one_split_model() -> None:
    with parallel(2), pytest.raises(RunnerError, match="close the other first"):
        parallel(2)


def test_fp8_on_two_ranks_is_as_near_to_the_exact_decoder_as_on_one() -> None:
    source, shape, ids = Biased(SHAPE, is_fp8=True), SHAPE, text(24)
    exact = Reference(shape, source, is_rounded=False).logits(ids.tolist())[-1]

    def errors(runner: CudaRunner | ParallelRunner) -> list[float]:
        found = [runner.prefill(0, ids, 0).copy()]
        runner.prefill(0, ids[:-1], 0)
        found.append(runner.decode(ids[-1:], np.array([23]))[0].copy())
        runner.close()
        return [float((torch.from_numpy(row).double() - exact).norm() / exact.norm()) for row in found]

    one = errors(CudaRunner(source, shape, device=str(DEVICE), **options()))
    two = errors(parallel(2, source))
    print("relative errors of FP8 on one rank and on two:", one, two)
    assert max(two) < 1.3 * max(one)


def test_the_invariant_mode_holds_over_ranks() -> None:
    with parallel(3, is_invariant=True) as runner:
        prompts = [text(12, seed) for seed in range(3)]

        def generate(num_rows: int) -> list[int]:
            tokens = np.array([int(runner.prefill(row, prompts[row], 0).argmax()) for row in range(num_rows)])
            found = [int(tokens[0])]
            for step in range(4):
                runner.start_decode(tokens, np.full(num_rows, 12 + step), [replace(WARM, step=step)] * num_rows, [0])
                decoded = runner.finish_decode()
                tokens = decoded.tokens.copy()
                found += [int(tokens[0]), hash(decoded.logits.tobytes())]
            return found

        assert generate(1) == generate(3)


@pytest.mark.gpu
@pytest.mark.parametrize("is_fp8", [False, True])
def test_gpus_exchange_their_parts_within_the_kernels(is_fp8: bool) -> None:
    """Batch 1 in one kernel on each GPU, and few rows, without a collective: step after step as on one GPU."""
    if GPUS < 2:
        pytest.skip(f"needs 2 NVIDIA GPUs, there are {GPUS}")
    shape = replace(
        SHAPE, hidden_size=1024, intermediate_size=3072, num_heads=16, num_kv_heads=4, head_dim=64, max_seq_len=512
    )
    source = Biased(shape, is_fp8=is_fp8)
    given = options(dtype=torch.bfloat16, max_num_batched_tokens=512)
    one = CudaRunner(source, shape, **given)
    prompts = [text(length, length) for length in (300, 7, 40)]
    with ParallelRunner(source, shape, size=2, **given) as two:
        decoder = two._runner._decoder
        assert decoder._persistent is not None and decoder.linear_ops.row_peer_buffers.peer_buffers.size == 2
        for runner in (one, two):
            for slot, ids in enumerate(prompts):
                runner.prefill(slot, ids, 0)
        for step in range(40):
            rows = (1, 3, 2)[step % 3]
            ids, positions = text(rows, step), np.array([len(prompt) + step for prompt in prompts[:rows]])
            found, wanted = (runner.decode(ids, positions).astype(np.float64) for runner in (two, one))
            near = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
            assert near.min() > (0.98 if is_fp8 else 0.9995), step
    one.close()


def test_a_single_rank_needs_no_other_and_captures_its_collectives() -> None:
    """With one GPU this is all of NCCL that there is."""
    SHAPES[1] = SHAPE
    with parallel(1) as runner:
        assert runner.pids == []
        one, ids = alone(1), text(6)
        for made in (one, runner):
            made.prefill(1, ids, 0)
        for rows in (1, 2):
            found, wanted = (made.decode(ids[:rows], np.full(rows, 6)).copy() for made in (runner, one))
            np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)
        one.close()
        if HAS_GPU:
            _, tokens = walk(runner)
            with no_more_memory():
                assert walk(runner)[1] == tokens


def test_a_built_model_is_loaded_on_so_many_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(2)
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "qwen2", intermediate_size=96))
    settings = {"tensor_parallel_size": 2, "max_num_seqs": 2}
    build(
        BuildOptions(
            checkpoint, "m", tmp_path / "models", target="cuda", precision="bf16", max_seq_len=48, settings=settings
        )
    )
    directory = tmp_path / "models" / "m-engine" / "1"
    config = pbtxt.parse_text((directory.parent / "config.pbtxt").read_text(), directory)
    read = EngineSettings.from_parameters({name: value.string_value for name, value in config.parameters.items()})
    places: dict[str, Any] = {} if HAS_GPU else {"dtype": DTYPE, "device_type": "cpu"}
    monkeypatch.setattr(
        "deepseek_triton.ensemble.engine.runners.cuda.parallel.ParallelRunner", partial(ParallelRunner, **places)
    )
    _, runner = load_runner(directory, read)
    assert isinstance(runner, ParallelRunner) and len(runner.pids) == 1
    shape = DecoderShape.from_dict(Manifest.load(directory).engine)
    reference = Reference(shape, StoredWeights(directory / "model.safetensors"))
    ids = text(3) % shape.vocab_size
    for position, token in enumerate(ids):
        logits = runner.decode(np.array([token]), np.array([position]))[0]
    wanted = reference.logits(ids.tolist())[-1].numpy()
    near = float(logits @ wanted / np.linalg.norm(logits) / np.linalg.norm(wanted))
    assert near > (0.999 if HAS_GPU else 0.999999)
    runner.close()


# ---- what goes wrong


def test_a_rank_that_is_killed_ends_the_model_with_one_line() -> None:
    failures: list[str] = []
    runner = parallel(2, on_failure=failures.append)
    runner.decode(np.array([1]), np.array([4]))
    pids = runner.pids
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(RunnerError, match=r"^rank 1's process was killed by SIGKILL$"):
        for _ in range(50):
            runner.decode(np.array([1]), np.array([5]))
    assert reported_failure(failures) == "rank 1's process was killed by SIGKILL"
    with pytest.raises(RunnerError, match="rank 1's process was killed by SIGKILL"):
        runner.decode(np.array([1]), np.array([5]))
    runner.close()
    runner.close()
    wait_until_dead(pids)


def test_a_model_is_closed_beside_a_dead_rank_and_what_was_begun_with_it() -> None:
    runner = parallel(2)
    pids = runner.pids
    os.kill(pids[0], signal.SIGSTOP)
    if HAS_GPU:  # gloo would wait in this very call
        runner.start_decode(np.array([1]), np.array([4]), [GREEDY], [])
    runner._ranks._is_closed.set()  # nobody watches any more, as in a process that is being ended
    os.kill(pids[0], signal.SIGKILL)
    began = time.monotonic()
    runner.close()
    assert time.monotonic() - began < 20
    wait_until_dead(pids)


def test_a_rank_that_hangs_ends_the_model() -> None:
    failures: list[str] = []
    runner = parallel(2, on_failure=failures.append, step_s=8.0)
    runner.decode(np.array([1]), np.array([4]))
    pids = runner.pids
    os.kill(pids[0], signal.SIGSTOP)
    with pytest.raises(RunnerError, match="a rank hangs: a call has taken more than 8 s"):
        for _ in range(50):
            runner.decode(np.array([1]), np.array([5]))
    assert reported_failure(failures) == "a rank hangs: a call has taken more than 8 s"
    runner.close()
    wait_until_dead(pids)


def test_what_fails_in_rank_0_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[str] = []
    runner = parallel(2, on_failure=failures.append)
    pids = runner.pids

    def fails(*arguments: object) -> None:
        raise RuntimeError("an illegal\nmemory access")

    monkeypatch.setattr(runner._runner, "start_decode", fails)
    with pytest.raises(RunnerError, match="rank 0: an illegal memory access"):
        runner.decode(np.array([1]), np.array([5]))
    assert "an illegal memory access" in reported_failure(failures)
    runner.close()
    wait_until_dead(pids)


def test_a_rank_that_cannot_load_says_why_and_leaves_nothing_behind() -> None:
    failures: list[str] = []
    source = Spoilt(Biased(SHAPE, is_fp8=False).entries, os.getpid())
    with pytest.raises(RunnerError, match=r"^rank 1: the GPU has 3 MiB free$"):
        parallel(2, source, on_failure=failures.append)
    assert not failures, "whoever loads is told, and goes on"
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    assert not [pid for pid in children if b"cuda.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_rank_0_s_own_failure_is_reported_too() -> None:
    source = Biased(replace(SHAPE, num_layers=1), is_fp8=False)
    with pytest.raises(RunnerError, match=r"^rank \d: tensor .* build the model again$"):
        parallel(2, source)


def test_each_rank_counts_its_own_bytes() -> None:
    shape = DecoderShape(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28, num_kv_heads=4,
        head_dim=128, rms_norm_eps=1e-6, max_seq_len=4096,
    )  # fmt: skip
    source = RandomWeights(shape, is_fp8=True, has_qkv_bias=True)
    splits = [ShardedDecoder(shape, 0, size) for size in (1, 2, 4)]
    weights = [weight_bytes(SplitWeights(source, split).entries.values()) for split in splits]
    embedding = 152064 * 3584 * 2
    matrices = weights[0] - 2 * embedding
    for size, found in zip((2, 4), weights[1:], strict=True):
        wanted = embedding + embedding / size + matrices / size  # but for norms and tables, which all have
        assert 1 < found / wanted < 1.01
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "itemsize": 2, "free": 16 * 2**30}
    with pytest.raises(RunnerError, match=r"the GPU has 16384 MiB free; lower max_num_seqs to \d+"):
        check_fits(splits[0].shape, weights[0], **limits)
    check_fits(splits[1].shape, weights[1], num_ranks=2, **limits)


PROGRAM = """
from tests.ensemble.engine.runners.test_cuda_parallel import parallel
runner = parallel(2)
print(*runner.pids, flush=True)
input()
"""


def test_no_rank_outlives_the_first() -> None:
    require(2)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 1 and is_alive(pids[0])
    process.kill()
    process.communicate()
    wait_until_dead(pids)


def workers_of(server_pid: int) -> list[int]:
    """The ranks whose engine is a child of this server."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            engine = parent_of(int(directory.name))
            server = parent_of(engine)
            if WORKER.encode() in (directory / "cmdline").read_bytes() and server_pid in (engine, server):
                found.append(int(directory.name))
    return found


def parent_of(pid: int) -> int:
    return int(stat_fields(pid)[1])


# A model.py for machines without GPUs.
MODEL = """
from functools import partial
import torch
from deepseek_triton.ensemble.engine.runners.cuda import parallel
parallel.ParallelRunner = partial(parallel.ParallelRunner, dtype=torch.float32, device_type="cpu")
from deepseek_triton.ensemble.models.engine import TritonPythonModel
"""


@pytest.mark.server
def test_a_real_server_runs_all_ranks_and_ends_with_the_first_that_dies(tmp_path: Path) -> None:
    require(2)
    if find_spec("pytriton") is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "qwen2", intermediate_size=96))
    models, log = tmp_path / "models", tmp_path / "log"
    settings = {"tensor_parallel_size": 2, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    build(BuildOptions(checkpoint, "m", models, target="cuda", precision="bf16", max_seq_len=48, settings=settings))
    if not HAS_GPU:
        (models / "m-engine" / "1" / "model.py").write_text(MODEL)
    with TritonServer(models, http_port=0, grpc_port=0, metrics_port=0, log_file=log) as server:
        with GrpcClient(server.grpc_url, "m", 120.0) as client:
            generation = client.generate(GenerateRequest(prompt="a b", max_tokens=4, end_id=-1))
            assert generation.num_output_tokens == 4
        (worker,) = workers_of(server.pid)
        os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while server.exit_status is None:
            assert time.monotonic() < deadline, "the server outlived the rank"
            time.sleep(0.1)
    assert "rank 1's process was killed by SIGKILL; the model ends" in log.read_text()
