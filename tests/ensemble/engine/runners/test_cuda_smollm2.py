"""Real weights on a GPU, built and loaded as a user does it: the cuda runner against the ONNX graphs, and served.

What the graphs say is computed beforehand, where there is ONNX Runtime and time: `benchmarks/smollm2_reference.py`.
SMOLLM2_REFERENCE names its output, build/smollm2 if it isn't set.
"""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.cuda_device import HAS_GPU  # isort: skip  # before triton

from benchmarks.smollm2_reference import CHECKPOINT, CHUNK, OUTPUT, RANGES, REFERENCE, WINDOW
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.clients.api import GenerateRequest, Message
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, PromptChunk
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.protocol.settings import KV_CACHES, EngineSettings, KvCache
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.support.checkpoints import smollm2_path

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]
PRECISIONS = ("bf16", "fp8")
MAX_NUM_SEQS = 16
GREEDY = DeviceSampling(0.0, 0, 1.0, 0.0, 0, 0)
Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """What smollm2_reference.py wrote of each computation: the graphs "float" and "fp8", the latter's codes and scales
    in "fp8_float32", and transformers in "bf16".

    windows: [n, WINDOW]. logits: [WINDOW / CHUNK, vocab_size], after CHUNK, 2 CHUNK, … tokens of the first window.
    tokens: [n, WINDOW], the likeliest after each token of each window.
    """

    directory: Path
    windows: Ids
    logits: dict[str, Logits]
    tokens: dict[str, NDArray[np.int32]]

    @property
    def checkpoint(self) -> Path:
        carried = self.directory / CHECKPOINT
        return carried if carried.exists() else smollm2_path()


@pytest.fixture(scope="module")
def reference() -> Reference:
    directory = Path(os.environ.get("SMOLLM2_REFERENCE", OUTPUT))
    if not (directory / REFERENCE).exists():
        pytest.skip(f"{directory / REFERENCE} isn't there: python -m benchmarks.smollm2_reference TEXT")
    with np.load(directory / REFERENCE) as found:
        return Reference(
            directory,
            found["windows"].astype(np.int64),
            {kind: found[f"{kind}_logits"].astype(np.float32) for kind in ("float", "fp8", "bf16")},
            {kind: found[f"{kind}_tokens"] for kind in ("float", "fp8", "fp8_float32")},
        )


@pytest.fixture(scope="module")
def repository(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one model for each precision."""
    models = tmp_path_factory.mktemp("cuda") / "models"
    for precision in PRECISIONS:
        ranges = reference.directory / RANGES if precision == "fp8" else None
        options = BuildOptions(
            reference.checkpoint, precision, models, target="cuda", precision=precision, max_seq_len=WINDOW,
            ranges=ranges, settings={"max_num_seqs": MAX_NUM_SEQS},
        )  # fmt: skip
        build(options)
    return models


@pytest.fixture(scope="module", params=PRECISIONS)
def loaded(request: pytest.FixtureRequest, repository: Path) -> Iterator[tuple[str, CudaRunner]]:
    """The precision, and its artefact in the runner that `load.py` makes of it."""
    settings = EngineSettings(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=WINDOW)
    manifest, runner = load_runner(repository / f"{request.param}-engine" / "1", settings)
    assert (manifest.target, manifest.precision) == ("cuda", request.param)
    assert isinstance(runner, CudaRunner)
    yield request.param, runner
    runner.close()


def cosines(found: Logits, wanted: Logits) -> NDArray[np.float64]:
    """Of each row."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    product: NDArray[np.float64] = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return product


def error(found: Logits, wanted: Logits) -> float:
    """1 − cosine, the geometric mean of all rows: a few rows' errors are ten times that, in every run others."""
    return float(np.exp(np.log(np.maximum(1 - cosines(found, wanted), 1e-12)).mean()))


def by_prefill(runner: CudaRunner, window: Ids) -> Logits:
    """The window in chunks, the last token's logits of each."""
    chunks = range(0, len(window), CHUNK)
    return np.stack([runner.prefill(3, window[start : start + CHUNK], start).copy() for start in chunks])


def by_prefill_at_once(runner: CudaRunner, window: Ids) -> Logits:
    """Every beginning of the window as a prompt of its own; short ones in two slots together."""
    rows: list[Logits] = []
    for end in range(CHUNK, len(window) + 1, CHUNK):
        slots = (0, 5) if 2 * end <= WINDOW else (0,)
        logits = runner.prefill_many([PromptChunk(slot, window[:end], 0) for slot in slots])
        assert cosines(logits[:1], logits[-1:]).min() > 0.999, "the same prompt in another slot"
        rows.append(logits[0].copy())
    return np.stack(rows)


def by_decode(num_rows: int) -> Callable[[CudaRunner, Ids], Logits]:
    """The window token by token in the last of `num_rows` slots, the others with tokens of their own."""

    def run(runner: CudaRunner, window: Ids) -> Logits:
        others = np.random.default_rng(0).integers(0, runner.vocab_size, (len(window), num_rows))
        rows = []
        for position, token in enumerate(window):
            ids = others[position].copy()
            ids[-1] = token
            logits = runner.decode(ids, np.full(num_rows, position))
            if (position + 1) % CHUNK == 0:
                rows.append(logits[-1].copy())
        return np.stack(rows)

    return run


WAYS: dict[str, Callable[[CudaRunner, Ids], Logits]] = {
    "prefill in chunks": by_prefill,
    "prefill at once": by_prefill_at_once,
    "batch 1": by_decode(1),
    "5 rows": by_decode(5),
    "every slot": by_decode(MAX_NUM_SEQS),
}


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_the_graphs(way: str, loaded: tuple[str, CudaRunner], reference: Reference) -> None:
    precision, runner = loaded
    exact, graph = reference.logits["float"], reference.logits["fp8"]
    found = WAYS[way](runner, reference.windows[0])
    near = cosines(found, exact)
    if precision == "bf16":
        # At a few positions BF16 itself is far from float32, whoever computes it.
        others = cosines(reference.logits["bf16"], exact)
        print(f"bf16, {way}: cosine {near.min():.6f} at least, {near.mean():.6f} on average")
        print(f"transformers in bf16: {others.min():.6f} at least, {others.mean():.6f} on average")
        assert near.min() >= min(0.999, others.min()) and near.mean() >= 0.9995
        return
    # Weights are rounded alike; activations differ in their last bits, and so does what E4M3 makes of them.
    ours, own, mutual = error(found, exact), error(graph, exact), error(found, graph)
    print(f"fp8, {way}: 1 - cosine {ours:.5f}, the graph's own {own:.5f}, between both {mutual:.5f}")
    assert ours <= 1.25 * own


def test_five_thousand_tokens_are_those_of_the_graph(loaded: tuple[str, CudaRunner], reference: Reference) -> None:
    """Teacher-forced, every window in a slot of its own."""
    precision, runner = loaded
    found = np.empty_like(reference.tokens["float"])
    samplings = [GREEDY] * len(reference.windows)
    for position in range(WINDOW):
        runner.start_decode(reference.windows[:, position], np.full(len(samplings), position), samplings, [])
        found[:, position] = runner.finish_decode().tokens
    assert found.size >= 5000
    float_tokens, graph, graph_again = (reference.tokens[kind] for kind in ("float", "fp8", "fp8_float32"))

    def agreement(a: NDArray[np.int32], b: NDArray[np.int32]) -> float:
        return float((a == b).mean())

    ours = agreement(found, float_tokens)
    if precision == "bf16":
        print(f"bf16: {ours:.2%} of {found.size} tokens are the float graph's")
        assert ours >= 0.985
        return
    # The graph agrees with itself, computed in another precision, no better than it does with us.
    graphs, itself, mutual = agreement(graph, float_tokens), agreement(graph, graph_again), agreement(found, graph)
    print(f"fp8: {ours:.2%} of {found.size} tokens are the float graph's, of the FP8 graph's {graphs:.2%}")
    print(f"fp8: {mutual:.2%} are the FP8 graph's, of the same in float32 {itself:.2%}")
    assert ours >= graphs - 0.01
    assert mutual >= itself - 0.01


def test_batch_1_and_a_full_batch_agree(loaded: tuple[str, CudaRunner], reference: Reference) -> None:
    precision, runner = loaded
    window = reference.windows[1]
    alone, together = by_decode(1)(runner, window), by_decode(MAX_NUM_SEQS)(runner, window)
    agreement, near = float((alone.argmax(1) == together.argmax(1)).mean()), cosines(alone, together).min()
    print(f"{precision}: cosine {near:.6f} at least, the likeliest equal at {agreement:.1%} of {len(alone)} positions")
    if precision == "bf16":
        assert near >= 0.999 and agreement >= 0.95
    else:
        own = error(reference.logits["fp8"], reference.logits["float"])
        assert error(alone, together) <= 2 * own and agreement >= 0.8


def negative_log_likelihood(runner: CudaRunner, windows: Ids) -> float:
    """The mean over all tokens but the first of each window, each decoded in a slot of its own."""
    if runner.num_blocks:
        blocks = 1 + np.random.default_rng(0).permutation(runner.num_blocks)
        for slot, own in enumerate(np.array_split(blocks, runner.max_num_seqs)):
            runner.set_blocks(slot, 0, own[: WINDOW // runner.block_size].tolist())
    rows, total = np.arange(len(windows)), 0.0
    for position in range(WINDOW - 1):
        runner.start_decode(windows[:, position], np.full(len(rows), position), [None] * len(rows), range(len(rows)))
        logits = runner.finish_decode().logits.astype(np.float64)
        highest = logits.max(axis=1)
        sums = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
        total += float((sums - logits[rows, windows[:, position + 1]]).sum())
    return total / (len(rows) * (WINDOW - 1))


def test_pages_cost_nothing_and_codes_in_them_little(repository: Path, reference: Reference) -> None:
    """Perplexity on real text: pages exactly as slots, INT8 keys and values at most 1.005 times that."""
    found: dict[KvCache, float] = {}
    for kv_cache in KV_CACHES:
        settings = EngineSettings(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=WINDOW, kv_cache=kv_cache)
        _, runner = load_runner(repository / "bf16-engine" / "1", settings)
        assert isinstance(runner, CudaRunner)
        found[kv_cache] = negative_log_likelihood(runner, reference.windows)
        runner.close()
    ratio = float(np.exp(found["pages-int8"] - found["slots"]))
    print(f"perplexity {np.exp(found['slots']):.3f}, with INT8 keys and values {ratio:.5f} times that")
    assert found["pages"] == found["slots"] and ratio <= 1.005


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_built_model_in_invariant_mode_gives_one_text(precision: str, repository: Path, reference: Reference) -> None:
    settings = EngineSettings(max_num_seqs=4, max_num_batched_tokens=64, batch_invariant=True)
    _, runner = load_runner(repository / f"{precision}-engine" / "1", settings)
    assert isinstance(runner, CudaRunner)
    prompts = reference.windows[:4, :40]

    def generate(num_rows: int) -> list[int]:
        first = [int(runner.prefill(slot, prompts[slot], 0).argmax()) for slot in range(num_rows)]
        tokens, found = np.array(first), first[:1]
        for step in range(60):
            runner.start_decode(tokens, np.full(num_rows, 40 + step), [GREEDY] * num_rows, [])
            tokens = runner.finish_decode().tokens.copy()
            found.append(int(tokens[0]))
        return found

    alone = generate(1)
    assert generate(4) == alone
    assert generate(3) == alone
    runner.close()


@pytest.mark.server
def test_a_real_server_answers_from_built_cuda_models(repository: Path, tmp_path: Path) -> None:
    if find_spec("pytriton") is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    question = GenerateRequest(messages=[Message("user", "What is the capital of France?")], max_tokens=40)
    log, answers = tmp_path / "log", dict[str, Any]()
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, log_file=log) as server:
        for precision in PRECISIONS:
            with GrpcClient(server.grpc_url, precision, 120.0) as client:
                generation = client.generate(question)
                chunks = list(client.stream(question))
            assert "".join(chunk.text for chunk in chunks) == generation.text
            assert len(chunks) > 3 and generation.finish_reason == "stop"
            answers[precision] = generation.text
        assert server.exit_status is None, log.read_text()[-3000:]
    print(answers)
    assert all("Paris" in text for text in answers.values()), answers
