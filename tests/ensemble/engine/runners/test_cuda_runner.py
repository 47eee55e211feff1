"""The cuda runner as the engine uses it: against float64, batch against single, every slot, the context's end."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.cuda_device import DEVICE, DTYPE, HAS_GPU, no_more_memory  # isort: skip  # before triton

from benchmarks.cuda_reference import Reference
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry
from deepseek_triton.ensemble.decoder.part import WHOLE, Shard
from deepseek_triton.ensemble.engine.runners.base import (
    LAST_TOKEN,
    DeviceSampling,
    OutOfMemoryError,
    PipelinedRunner,
    PromptChunk,
    RunnerError,
    SamplingRunner,
)
from deepseek_triton.ensemble.engine.runners.cuda.graphs import PromptSizes, captured_size, captured_sizes
from deepseek_triton.ensemble.engine.runners.cuda.pages import SLOTS
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from tests.support.checkpoints import make_checkpoint, make_tokenizer

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]

SHAPE = DecoderShape(
    vocab_size=320, hidden_size=64, intermediate_size=112, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    rms_norm_eps=1e-5, max_seq_len=96,
)  # fmt: skip
GREEDY = DeviceSampling(0.0, 0, 1.0, 0.0, 0, 0)
Ids = NDArray[np.int64]


class Biased(RandomWeights):
    """A bias on every matrix, as bias correction leaves it; made on `DEVICE`, so that all readers get the same."""

    def __init__(self, shape: DecoderShape, *, is_fp8: bool, seed: int = 0) -> None:
        super().__init__(shape, is_fp8=is_fp8, has_qkv_bias=True, seed=seed)
        names = frozenset(shape.linear_names())
        self.entries = shape.entries(names if is_fp8 else frozenset(), names)

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        return super().load(name, DEVICE, shard).to(device)


def make(shape: DecoderShape = SHAPE, *, is_fp8: bool = True, max_num_seqs: int = 5, **more: Any) -> CudaRunner:
    options: dict[str, Any] = {"dtype": DTYPE, "device": str(DEVICE), "max_num_batched_tokens": 64, **more}
    return CudaRunner(Biased(shape, is_fp8=is_fp8), shape, max_num_seqs=max_num_seqs, **options)


@pytest.fixture
def runner() -> Iterator[CudaRunner]:
    made = make()
    yield made
    made.close()


def texts(*lengths: int) -> list[Ids]:
    random = np.random.default_rng(0)
    return [random.integers(0, SHAPE.vocab_size, length) for length in lengths]


def cosine(found: NDArray[np.float32], wanted: torch.Tensor) -> float:
    a, b = torch.from_numpy(np.array(found)).double(), wanted
    return float((a * b).sum() / a.norm() / b.norm())


SHAPES = {
    "qwen2": SHAPE,
    "qwen3, odd heads, tied": replace(SHAPE, qk_norm=True, head_dim=24, tie_word_embeddings=True),
    "multi-head": replace(SHAPE, num_kv_heads=4),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_logits_are_those_of_the_decoder_in_float64(name: str, is_fp8: bool) -> None:
    shape = SHAPES[name]
    made, reference = make(shape, is_fp8=is_fp8), Reference(shape, Biased(shape, is_fp8=is_fp8))
    # FP8: a value on the border between two codes may fall either way, and moves what follows.
    least = 0.98 if is_fp8 else 0.9995 if HAS_GPU else 0.999999
    a, b, c = texts(40, 6, 20)
    wanted = [reference.logits(text.tolist()) for text in (a, b, c)]
    packed = made.prefill_many([PromptChunk(2, c[:17], 0), PromptChunk(0, a[:33], 0)])
    assert cosine(packed[0], wanted[2][16]) > least
    assert cosine(packed[1], wanted[0][32]) > least
    assert cosine(made.prefill(1, b[:1], 0), wanted[1][0]) > least
    assert cosine(made.prefill(1, b[1:3], 1), wanted[1][2]) > least, "a prompt's second chunk"
    together = made.decode(np.array([a[33], b[3], c[17]]), np.array([33, 3, 17]))
    for row, (text, position) in enumerate(((0, 33), (1, 3), (2, 17))):
        assert cosine(together[row], wanted[text][position]) > least
    assert cosine(made.decode(a[34:35], np.array([34]))[0], wanted[0][34]) > least, "batch 1"
    made.close()


def generate(
    runner: CudaRunner, prompts: dict[int, Ids], num_tokens: int, samplings: dict[int, DeviceSampling]
) -> dict[int, list[int]]:
    """Slot → tokens; prompts one by one, then every slot's tokens together."""
    slots, rows = sorted(prompts), max(prompts) + 1
    found = {slot: [int(runner.prefill(slot, prompts[slot], 0).argmax())] for slot in slots}
    for step in range(num_tokens - 1):
        ids, positions = np.zeros(rows, np.int64), np.full(rows, runner.max_seq_len - 1)
        row_samplings: list[DeviceSampling | None] = [None] * rows
        for slot in slots:
            ids[slot], positions[slot] = found[slot][-1], len(prompts[slot]) + step
            row_samplings[slot] = replace(samplings[slot], step=step)
        runner.start_decode(ids, positions, row_samplings, [])
        tokens = runner.finish_decode().tokens
        for slot in slots:
            found[slot].append(int(tokens[slot]))
    return found


def test_the_invariant_mode_gives_each_sequence_the_same_tokens_alone_and_in_company() -> None:
    count = 30 if HAS_GPU else 6
    prompts = dict(enumerate(texts(9, 30, 2, 17, 25)))
    samplings = {slot: replace(GREEDY, temperature=0.8 * (slot % 2), top_p=0.9, seed=slot) for slot in prompts}
    together = make(is_invariant=True)
    all_at_once = generate(together, prompts, count, samplings)
    together.close()
    for slot in prompts if HAS_GPU else [1]:
        alone = make(is_invariant=True)
        assert generate(alone, {0: prompts[slot]}, count, {0: samplings[slot]})[0] == all_at_once[slot]
        alone.close()


def test_a_step_may_begin_before_the_last_ones_tokens_are_known(runner: CudaRunner) -> None:
    assert isinstance(runner, SamplingRunner)
    prompt = texts(12)[0]
    sampling = DeviceSampling(0.9, 0, 1.0, 0.0, 3, 0)
    one_by_one = generate(runner, {0: prompt}, 6, {0: sampling})[0]
    token, found = int(runner.prefill(0, prompt, 0).argmax()), []
    for step in range(5):
        runner.start_decode(
            np.array([LAST_TOKEN if step else token]), np.array([12 + step]), [replace(sampling, step=step)], []
        )
        if step:
            found.append(int(runner.finish_decode().tokens[0]))
    found.append(int(runner.finish_decode().tokens[0]))
    assert [token, *found] == one_by_one


def test_a_prompt_s_first_token_is_sampled_on_the_gpu_and_decoded_before_it_is_known(
    runner: CudaRunner,
) -> None:
    assert isinstance(runner, PipelinedRunner)
    a, b, c = texts(20, 9, 12)
    logits = runner.prefill_many([PromptChunk(3, a, 0), PromptChunk(0, b, 0), PromptChunk(2, c[:8], 0)])
    warm = replace(GREEDY, temperature=0.9, seed=5)
    chunks = [PromptChunk(3, a, 0), PromptChunk(0, b, 0), PromptChunk(2, c[:8], 0)]
    runner.start_prefill(chunks, [GREEDY, warm, None], [])
    runner.start_decode(
        np.array([LAST_TOKEN, 0, 0, LAST_TOKEN]),
        np.array([9, 95, 8, 20]),
        [replace(warm, step=1), None, None, GREEDY],
        [],
    )
    runner.start_prefill([PromptChunk(2, c[8:], 8)], [None], [0])
    first = runner.finish_prefill()
    tokens, log_probs = first.tokens.copy(), first.log_probs.copy()
    assert tokens[0] == logits[0].argmax()
    wanted = torch.from_numpy(logits.copy()).double().log_softmax(-1)
    assert all(abs(float(log_probs[row]) - float(wanted[row, tokens[row]])) < 1e-3 for row in (0, 1))
    ahead = runner.finish_decode().tokens.copy()
    last = runner.finish_prefill().logits.copy()
    np.testing.assert_allclose(last[0], runner.prefill(2, c[8:], 8), rtol=1e-5, atol=1e-5)
    # The same, one after the other: the first token is sampled as a decode samples it, with the same seed and step.
    runner.prefill(3, a, 0)
    runner.prefill(0, b[:-1], 0)
    runner.start_decode(np.array([b[-1]]), np.array([8]), [warm], [])
    assert runner.finish_decode().tokens[0] == tokens[1]
    runner.start_decode(
        np.array([tokens[1], 0, 0, tokens[0]]),
        np.array([9, 95, 95, 20]),
        [replace(warm, step=1), None, None, GREEDY],
        [],
    )
    again = runner.finish_decode().tokens
    assert [ahead[0], ahead[3]] == [again[0], again[3]]


def test_a_step_that_cannot_begin_leaves_the_one_in_flight_its_tokens(
    runner: CudaRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, position = texts(6)[0], np.array([6])
    ids = np.array([runner.prefill(0, text, 0).argmax()])
    runner.start_decode(ids, position, [GREEDY], [])
    wanted = int(runner.finish_decode().tokens[0])
    other = (wanted + 1) % SHAPE.vocab_size
    runner.start_decode(ids, position, [GREEDY], [])
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_run", lambda _size: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            runner.start_decode(ids, position, [GREEDY], [])
    runner.start_decode(np.array([other]), position + 1, [GREEDY], [])
    assert runner.finish_decode().tokens[0] == wanted
    assert runner.finish_decode().log_probs[0] < 0


def test_what_is_abandoned_is_never_heard_of_again(runner: CudaRunner) -> None:
    text = texts(6)[0]
    runner.start_prefill([PromptChunk(0, text, 0)], [GREEDY], [])
    runner.start_prefill([PromptChunk(1, text, 0)], [GREEDY], [])
    with pytest.raises(RunnerError, match="2 prefills are in flight"):
        runner.start_prefill([PromptChunk(2, text, 0)], [GREEDY], [])
    runner.start_decode(np.array([LAST_TOKEN]), np.array([6]), [GREEDY], [])
    runner.abandon()
    with pytest.raises(RunnerError, match="no prefill"):
        runner.finish_prefill()
    with pytest.raises(RunnerError, match="no decode step"):
        runner.finish_decode()
    runner.start_prefill([PromptChunk(0, text, 0)], [GREEDY], [])
    assert runner.finish_prefill().tokens[0] == runner.prefill(1, text, 0).argmax()


def test_three_steps_in_flight_are_too_many(runner: CudaRunner) -> None:
    for _ in range(2):
        runner.start_decode(np.array([1]), np.array([0]), [GREEDY], [])
    with pytest.raises(RunnerError, match="finish one first"):
        runner.start_decode(np.array([1]), np.array([0]), [GREEDY], [])
    runner.finish_decode()
    runner.finish_decode()
    with pytest.raises(RunnerError, match="no decode step"):
        runner.finish_decode()


def test_logits_come_with_the_tokens_of_the_rows_that_were_asked_for(runner: CudaRunner) -> None:
    for slot, text in enumerate(texts(4, 9, 6)):
        runner.prefill(slot, text, 0)
    runner.start_decode(np.array([5, 6, 7]), np.array([4, 9, 6]), [GREEDY, GREEDY, None], [2, 0])
    step = runner.finish_decode()
    logits, tokens, log_probs = (np.array(values) for values in (step.logits, step.tokens, step.log_probs))
    plain = runner.decode(np.array([5, 6, 7]), np.array([4, 9, 6]))
    np.testing.assert_array_equal(logits, plain[[2, 0]])
    assert tokens[:2].tolist() == plain[:2].argmax(axis=1).tolist()
    wanted = torch.from_numpy(plain[0]).double().log_softmax(-1).max()
    assert abs(float(log_probs[0]) - float(wanted)) < 1e-4


def test_the_last_position_of_a_slot_is_used_and_the_next_slot_left_alone(runner: CudaRunner) -> None:
    end = SHAPE.max_seq_len
    text, other = texts(end, 8)
    runner.prefill(1, other, 0)
    before = runner.decode(np.array([0, 3]), np.array([0, 8]))[1].copy()
    runner.prefill(0, text[:60], 0)
    runner.prefill(0, text[60 : end - 1], 60)
    last = runner.decode(text[-1:], np.array([end - 1]))[0].copy()
    reference = Reference(SHAPE, Biased(SHAPE, is_fp8=True)).logits(text.tolist())[-1]
    assert cosine(last, reference) > 0.97
    np.testing.assert_allclose(runner.decode(np.array([0, 3]), np.array([0, 8]))[1], before, rtol=1e-5, atol=1e-5)


def test_a_copied_prefix_is_as_good_as_the_original(runner: CudaRunner) -> None:
    text = texts(20)[0]
    runner.prefill(3, text, 0)
    runner.copy_prefix(3, 1, 15)
    copied = runner.prefill(1, text[15:], 15).copy()
    runner.prefill(2, text[:15], 0)
    np.testing.assert_array_equal(copied, runner.prefill(2, text[15:], 15))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.prefill(0, np.zeros(65, np.int64), 0), "65 prompt tokens"),
        (lambda r: r.prefill(0, np.zeros(0, np.int64), 0), "0 prompt tokens"),
        (lambda r: r.prefill(0, np.zeros(10, np.int64), 90), "position 100, a slot holds 96"),
        (lambda r: r.decode(np.zeros(6, np.int64), np.zeros(6, np.int64)), "6 rows"),
        (lambda r: r.decode(np.zeros(1, np.int64), np.array([96])), "position 96"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_written(
    call: Callable[[CudaRunner], object], words: str, runner: CudaRunner
) -> None:
    with pytest.raises(RunnerError, match=words):
        call(runner)


def test_captured_sizes_reach_exactly_all_slots() -> None:
    assert captured_sizes(1) == [1]
    assert captured_sizes(20) == [1, 2, 4, 8, 12, 16, 20]
    assert [captured_size(n, 20) for n in (1, 3, 9, 17, 20)] == [1, 4, 12, 20, 20]
    assert captured_sizes(256)[-4:] == [96, 128, 192, 256]


def test_every_prefill_finds_a_captured_size() -> None:
    sizes = PromptSizes.of(2100, 40)
    assert list(sizes.chunks) == [16, 32, 64, 96, 128, 192, 256, 384, *range(512, 2049, 128), 2112]
    assert PromptSizes.of(1, 3).chunks == {16: 3}
    chunks = PromptSizes.of(512, 90).chunks
    assert chunks == {16: 16, 32: 32, 64: 64, 96: 64, 128: 64, 192: 64, 256: 64, 384: 64, 512: 90}
    assert all(b - a == 512 for a, b in pairwise(size for size in PromptSizes.of(8192, 1).chunks if size >= 4096))
    for lengths, size in (([1], 16), ([17], 32), ([1] * 8, 16), ([1] * 17, 32), ([9] * 40, 384), ([700, 400], 1152)):
        prompts = [PromptChunk(slot, np.arange(length), 0) for slot, length in enumerate(lengths)]
        assert sizes.fitting(prompts) == size
        packed = sizes.pack(prompts, size)
        assert (len(packed.ids), len(packed.last_rows)) == (size, sizes.chunks[size])
        assert int(packed.tiles[:, 3].sum()) == sum(lengths)
        assert len(packed.tiles) == size // 128 + sizes.chunks[size]


def test_as_many_chunks_as_slots_are_computed_at_once(runner: CudaRunner) -> None:
    prompts = texts(3, 1, 30, 2, 9)
    alone = [runner.prefill(slot, text, 0).copy() for slot, text in enumerate(prompts)]
    together = runner.prefill_many([PromptChunk(slot, text, 0) for slot, text in enumerate(prompts)])
    for found, wanted in zip(together, alone, strict=True):
        assert cosine(found, torch.from_numpy(wanted).double()) > (0.99 if HAS_GPU else 0.999999)
    with pytest.raises(RunnerError, match="6 chunks of prompts at once, there are 5 slots"):
        runner.prefill_many([PromptChunk(0, prompts[0], 0)] * 6)


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(RunnerError, match=r"tensor .* build the model again"):
        make_from = Biased(replace(SHAPE, num_layers=1), is_fp8=True)
        CudaRunner(make_from, SHAPE, max_num_seqs=1, max_num_batched_tokens=8, device=str(DEVICE), dtype=DTYPE)


class TestGpu:
    """What only a GPU shows."""

    pytestmark = gpu

    def test_too_many_slots_name_how_many_fit(self) -> None:
        with pytest.raises(RunnerError, match=r"lower max_num_seqs to \d+, or build with max_seq_len \d+"):
            make(replace(SHAPE, max_seq_len=4096, num_layers=28), max_num_seqs=10**6)

    def test_no_step_takes_memory(self) -> None:
        shape = replace(SHAPE, max_seq_len=700)
        runner, text = make(shape, max_num_batched_tokens=640), np.random.default_rng(1).integers(0, 320, 640)
        warm = replace(GREEDY, temperature=0.9, top_k=20, top_p=0.9)

        def walk() -> list[Any]:
            found: list[Any] = [runner.prefill(1, text[:length], 0).tolist() for length in (1, 100, 513, 640)]
            chunks = [PromptChunk(slot, text[: 9 * slot + 1], 0) for slot in range(5)]
            runner.start_prefill(chunks, [warm] * 5, [3])
            runner.start_decode(np.full(5, LAST_TOKEN), np.arange(5) * 9 + 1, [warm] * 5, [1, 2])
            for step in (runner.finish_prefill(), runner.finish_decode()):
                found += [step.tokens.tolist(), step.logits.tolist()]
            runner.copy_prefix(1, 0, 600)
            return [*found, runner.decode(text[:1], np.array([600])).tolist()]

        first = walk()
        with no_more_memory():
            assert walk() == first
        runner.close()

    def test_out_of_memory_is_distinguished_from_other_failures(
        self, runner: CudaRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = texts(10)[0]
        first = runner.prefill(0, text, 0).copy()
        with monkeypatch.context() as patch:
            patch.setattr(runner, "_prefill", lambda chunks: torch.empty(2**50, dtype=torch.uint8, device="cuda"))
            with pytest.raises(OutOfMemoryError, match="no memory for this step"):
                runner.prefill(1, text, 0)
        np.testing.assert_array_equal(runner.prefill(1, text, 0), first)

    def test_a_graph_whose_memory_moved_is_not_replayed(self, runner: CudaRunner) -> None:
        runner._finished_splits = runner._finished_splits.clone()
        with pytest.raises(AssertionError, match="moved"):
            runner.decode(np.array([1]), np.array([0]))

    def test_every_replay_gives_the_same_bits(self, runner: CudaRunner) -> None:
        runner.prefill(0, texts(40)[0], 0)
        for rows in (1, 2, 5):
            ids, positions = np.arange(rows), np.full(rows, 40)
            first = runner.decode(ids, positions).copy()
            assert np.isfinite(first).all()
            for _ in range(30):
                np.testing.assert_array_equal(runner.decode(ids, positions), first)

    def test_prompts_in_graphs_of_different_sizes_agree(self) -> None:
        shape = replace(SHAPE, max_seq_len=700)
        runner, text = (
            make(shape, is_fp8=False, max_num_batched_tokens=640),
            np.random.default_rng(1).integers(0, 320, 640),
        )
        whole = runner.prefill(0, text, 0).copy()
        for cut in (500, 600, 639):
            runner.prefill(1, text[:cut], 0)
            assert cosine(runner.prefill(1, text[cut:], cut), torch.from_numpy(whole).double()) > 0.9995
        runner.close()


def test_a_built_artefact_is_loaded_as_its_manifest_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "qwen2"))
    build(BuildOptions(checkpoint, "m", tmp_path / "models", target="cuda", precision="bf16", max_seq_len=48))
    build(BuildOptions(checkpoint, "o", tmp_path / "models", max_seq_len=48))
    made: list[dict[str, Any]] = []

    def runner(*arguments: Any, **options: Any) -> CudaRunner:
        made.append(options)
        return CudaRunner(*arguments, **options, device=str(DEVICE), dtype=DTYPE)

    monkeypatch.setattr("deepseek_triton.ensemble.engine.runners.cuda.runner.CudaRunner", runner)
    settings = EngineSettings(max_num_seqs=3, max_num_batched_tokens=32, batch_invariant=True)
    manifest, ours = load_runner(tmp_path / "models" / "m-engine" / "1", settings)
    _, graph = load_runner(tmp_path / "models" / "o-engine" / "1", replace(settings, batch_invariant=False))
    assert made == [{"max_num_seqs": 3, "max_num_batched_tokens": 32, "is_invariant": True, "cache_form": SLOTS}]
    load_runner(tmp_path / "models" / "m-engine" / "1", replace(settings, max_num_batched_tokens=500))[1].close()
    assert made[1]["max_num_batched_tokens"] == 3 * 48, "no more than it can be given"
    assert (manifest.target, ours.max_num_seqs, ours.max_seq_len) == ("cuda", 3, 48)
    text = np.random.default_rng(0).integers(0, ours.vocab_size, 30)
    wanted = torch.from_numpy(graph.prefill(1, text[:29], 0).copy()).double()
    assert cosine(ours.prefill(1, text[:29], 0), wanted) > 0.999  # weights in bfloat16 against float32
    wanted = torch.from_numpy(graph.decode(text[[3, 29]], np.array([47, 29]))[1].copy()).double()
    assert cosine(ours.decode(text[[3, 29]], np.array([47, 29]))[1], wanted) > 0.999
    ours.close()
    graph.close()


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(RunnerError, match="torch sees no NVIDIA GPU"):
        CudaRunner(Biased(SHAPE, is_fp8=True), SHAPE, max_num_seqs=1, max_num_batched_tokens=8)


def test_the_device_must_have_fp8() -> None:
    from unittest import mock

    from deepseek_triton.ensemble.engine.runners.cuda.device import check_device

    source = mock.Mock(entries={"x": TensorEntry("F8_E4M3", (1,))})
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)),
        pytest.raises(RunnerError, match=r"this GPU has 8\.0; build with --precision bf16"),
    ):
        check_device(source, torch.device("cpu"))
