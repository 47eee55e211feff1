"""The graph on ONNX Runtime against transformers: logits, greedy tokens, batches and chunks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.checkpoints import OPTIONS, load_reference, make_checkpoint, smollm2_path

torch = pytest.importorskip("torch")

PROMPT_LEN, NEW_TOKENS, MAX_SEQ_LEN = 40, 64, 128
TOLERANCE = 1e-3  # in the logits, float32
Build = Callable[..., tuple[Path, OnnxRunner]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def build(
        option: str = "llama", *, dtype: str = "float32", shard: str = "5GB", **graph: Any
    ) -> tuple[Path, OnnxRunner]:
        directory = make_checkpoint(tmp_path / "checkpoint", option, dtype, shard)
        return directory, graph_runner(directory, tmp_path, **graph)

    return build


def graph_runner(checkpoint: Path | Checkpoint, parent: Path, max_num_seqs: int = 4, **graph: Any) -> OnnxRunner:
    # A directory for each: ONNX Runtime maps the weights, and a file that is written anew under it is a bus error.
    directory = Path(tempfile.mkdtemp(dir=parent))
    source = open_checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    path = build_graph(source.spec, source.read, directory, **{"max_seq_len": MAX_SEQ_LEN, "fuses": True, **graph})
    return OnnxRunner(path, max_num_seqs=max_num_seqs, num_threads=2)


def prompt(length: int = PROMPT_LEN, vocab_size: int = 319, seed: int = 1) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).integers(0, vocab_size, length)


def greedy(runner: OnnxRunner, ids: np.ndarray[Any, Any], count: int, slot: int = 0) -> list[int]:
    tokens = [int(runner.prefill(slot, ids, 0).argmax())]
    while len(tokens) < count:
        step = np.zeros(slot + 1, np.int64)
        positions = np.zeros(slot + 1, np.int64)
        step[slot], positions[slot] = tokens[-1], len(ids) + len(tokens) - 1
        tokens.append(int(runner.decode(step, positions)[slot].argmax()))
    return tokens


def assert_agrees(runner: OnnxRunner, reference: Any, ids: np.ndarray[Any, Any]) -> None:
    with torch.no_grad():
        expected = reference(torch.tensor(ids)[None]).logits[0, -1].numpy()
        generated = reference.generate(
            torch.tensor(ids)[None], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )[0, len(ids) :].tolist()
    assert np.abs(runner.prefill(0, ids, 0) - expected).max() <= TOLERANCE
    end = reference.generation_config.eos_token_id
    ours = greedy_without_end(runner, ids, NEW_TOKENS, end)
    assert ours == generated
    assert len(set(ours)) > 8, "a degenerate text would prove little"


def greedy_without_end(runner: OnnxRunner, ids: np.ndarray[Any, Any], count: int, end: Any) -> list[int]:
    """As transformers generates under min_new_tokens: the end tokens can't be chosen."""
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    logits, tokens = runner.prefill(0, ids, 0).copy(), []
    for step in range(count):
        logits[ends] = -np.inf
        tokens.append(int(logits.argmax()))
        if step < count - 1:
            logits = runner.decode(np.array(tokens[-1:]), np.array([len(ids) + step]))[0].copy()
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_logits_and_greedy_tokens_are_those_of_transformers(option: str, build: Build) -> None:
    directory, runner = build(option)
    assert_agrees(runner, load_reference(directory), prompt())


@pytest.mark.parametrize("option", OPTIONS)
def test_a_graph_of_onnx_operators_alone_agrees_with_the_fused_one(option: str, build: Build, tmp_path: Path) -> None:
    directory, fused = build(option)
    plain, ids = graph_runner(directory, tmp_path, fuses=False), prompt()
    np.testing.assert_allclose(plain.prefill(0, ids, 0), fused.prefill(0, ids, 0), atol=TOLERANCE)
    assert greedy(plain, ids, 16) == greedy(fused, ids, 16)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["llama", "qwen3"])
def test_opset_23_for_older_onnx_runtimes_agrees_too(option: str, build: Build) -> None:
    directory, runner = build(option, opset=23)
    assert_agrees(runner, load_reference(directory), prompt())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "shard"), [("bfloat16", "5GB"), ("float16", "5GB"), ("bfloat16", "60KB")])
def test_half_precision_and_sharded_checkpoints(dtype: str, shard: str, build: Build) -> None:
    directory, runner = build("qwen2", dtype=dtype, shard=shard)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == (shard == "60KB")
    assert_agrees(runner, load_reference(directory), prompt())


@pytest.mark.slow
def test_smollm2_from_gguf(smollm2_reference: Any, tmp_path: Path) -> None:
    source = open_checkpoint(smollm2_path())  # once: to parse the file takes seconds
    source.write_tokenizer(tmp_path)
    ids = Tokenizer.from_directory(tmp_path).encode("Once upon a time, in a small village by the sea, there lived")
    assert_agrees(graph_runner(source, tmp_path, max_num_seqs=1), smollm2_reference, ids.astype(np.int64))


def test_prefill_in_chunks_equals_prefill_at_once(build: Build) -> None:
    _, runner = build()
    ids = prompt(100)
    whole = runner.prefill(0, ids, 0).copy()
    for start in range(0, 100, 7):
        last = runner.prefill(1, ids[start : start + 7], start)
    np.testing.assert_allclose(last, whole, atol=1e-4)


def test_a_batch_of_unequal_prompts_equals_one_by_one(build: Build) -> None:
    _, runner = build()
    prompts = [prompt(length, seed=length) for length in (3, 40, 17, 1)]
    alone = [greedy(runner, ids, 20) for ids in prompts]

    tokens = [[int(runner.prefill(slot, ids, 0).argmax())] for slot, ids in enumerate(prompts)]
    for step in range(19):
        positions = np.array([len(ids) + step for ids in prompts])
        logits = runner.decode(np.array([row[-1] for row in tokens]), positions)
        for row, scores in zip(tokens, logits, strict=True):
            row.append(int(scores.argmax()))
    assert tokens == alone


def test_padded_rows_of_one_graph_run_give_their_own_last_logits(build: Build) -> None:
    _, runner = build()
    prompts = [prompt(length, seed=length) for length in (5, 30, 12)]
    alone = [runner.prefill(3, ids, 0).copy() for ids in prompts]
    padded = np.zeros((3, 30), np.int64)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = ids
    together = runner._run(0, padded, np.zeros(3, np.int64), np.array([5, 30, 12]))
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-4)


def test_a_sequence_may_fill_the_context_to_its_end_in_any_slot(build: Build) -> None:
    directory, runner = build()
    ids = prompt(MAX_SEQ_LEN)
    with torch.no_grad():
        expected = load_reference(directory)(torch.tensor(ids)[None]).logits[0, -1].numpy()
    runner.prefill(3, ids[:-1], 0)
    step, positions = np.zeros(4, np.int64), np.zeros(4, np.int64)
    step[3], positions[3] = ids[-1], MAX_SEQ_LEN - 1
    assert np.abs(runner.decode(step, positions)[3] - expected).max() <= TOLERANCE


def test_the_cache_is_updated_in_place_and_other_slots_are_untouched(build: Build) -> None:
    _, runner = build()
    before = {name: cache.copy() for name, cache in runner._caches.items()}
    runner.prefill(2, prompt(10), 0)
    for name, cache in runner._caches.items():
        assert np.array_equal(cache[[0, 1, 3]], before[name][[0, 1, 3]])
        assert np.any(cache[2, :, :10]) and not np.any(cache[2, :, 10:])
    assert runner.cache_bytes == sum(cache.nbytes for cache in runner._caches.values())


def test_fp16_graph_stays_near_the_float32_one(build: Build, tmp_path: Path) -> None:
    directory, runner = build()
    half = graph_runner(directory, tmp_path, precision="fp16")
    ids = prompt()
    reference, logits = runner.prefill(0, ids, 0), half.prefill(0, ids, 0)
    cosine = reference @ logits / np.linalg.norm(reference) / np.linalg.norm(logits)
    assert cosine > 0.999
    assert half.cache_bytes * 2 == runner.cache_bytes


def test_all_logits_are_those_of_every_position(build: Build, tmp_path: Path) -> None:
    import onnxruntime

    from deepseek_triton.builders.graph.decoder import build_graph

    directory, _ = build()
    source = open_checkpoint(directory)
    path = build_graph(source.spec, source.read, tmp_path, max_seq_len=MAX_SEQ_LEN, logits="all")
    session = onnxruntime.InferenceSession(str(path))
    ids = prompt(20)[None]
    feeds = {"input_ids": ids, "start": np.zeros(1, np.int64), "num_tokens": np.array([20])}
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            feeds[value.name] = np.zeros((1, *value.shape[1:]), np.float32)
    with torch.no_grad():
        expected = load_reference(directory)(torch.tensor(ids)).logits.numpy()
    (logits,) = session.run(["logits"], feeds)
    assert np.abs(logits - expected).max() <= TOLERANCE


def test_caches_that_do_not_fit_into_memory_are_refused_at_load(build: Build, tmp_path: Path) -> None:
    directory, _ = build()
    source = open_checkpoint(directory)
    build_graph(source.spec, source.read, tmp_path, max_seq_len=MAX_SEQ_LEN)
    with pytest.raises(RunnerError, match=r"slots of 128 tokens need \d+ MiB, \d+ MiB are free; lower max_num_seqs"):
        OnnxRunner(tmp_path / "model.onnx", max_num_seqs=10**9)
