"""Scoring on target cuda: passes share blocks rightly, log probabilities are those of whole texts and of the graph."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cuda_device import DEVICE, DTYPE, HAS_GPU  # isort: skip  # before triton

from benchmarks.cuda_reference import Reference
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.decoder.options import LatentOptions
from deepseek_triton.ensemble.decoder.part import WHOLE, Shard
from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.cuda.plan import INVARIANT
from deepseek_triton.ensemble.engine.runners.cuda.scoring.passes import PassLimits, Prefix, plan_passes
from deepseek_triton.ensemble.engine.runners.cuda.scoring.runner import CudaScoringRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights
from deepseek_triton.ensemble.engine.runners.load import load_scoring_runner
from deepseek_triton.ensemble.scoring.rows import Ints, ScoreRow, make_row
from deepseek_triton.ensemble.scoring.settings import ScoringSettings
from tests.support.checkpoints import make_checkpoint, make_tokenizer

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]

SHAPE = DecoderShape(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
    rms_norm_eps=1e-5, max_seq_len=100,
)  # fmt: skip
LATENT = LatentOptions(None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
BLOCK = 4
PREFIX = Prefix(np.arange(900, 908, dtype=np.int32), (1, 2))


def ints(*values: int) -> Ints:
    return np.array(values, np.int32)


def tokens(seed: int, length: int) -> Ints:
    return np.random.default_rng(seed).integers(0, SHAPE.vocab_size, length).astype(np.int32)


def contexts(row: ScoreRow) -> list[list[int]]:
    """What each of the row's logits has read."""
    found = []
    for place in row.logit_positions.tolist():
        seen = (row.branch_ids == 0) | (row.branch_ids == row.branch_ids[place])
        found.append(row.input_ids[: place + 1][seen[: place + 1]].tolist())
    return found


texts = st.lists(st.integers(0, 99), min_size=1, max_size=22)
candidates = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5)


@given(
    st.lists(st.tuples(st.booleans(), texts, candidates), min_size=1, max_size=6),
    st.integers(1, 80),
    st.integers(1, 3),
)
def test_every_logit_reads_its_prompt_and_its_own_candidate(
    made: list[tuple[bool, list[int], list[list[int]]]], max_pass_tokens: int, num_logits: int
) -> None:
    """The cache is simulated: each block holds token ids instead of keys and values."""
    rows = [
        make_row(ints(*(PREFIX.ids if begins else ()), *text), [ints(*own) for own in labels])[0]
        for begins, text, labels in made
    ]
    limits = PassLimits.of(max_pass_tokens, 80, len(PREFIX.ids), BLOCK)
    limits = replace(limits, num_logits=num_logits)
    cache = np.full((limits.num_blocks + 1, BLOCK), -1)
    cache[1:3] = PREFIX.ids.reshape(2, BLOCK)
    found: dict[tuple[int, int], list[int]] = {}
    for sequences in plan_passes(rows, PREFIX, limits):
        assert sum(len(own.ids) for own in sequences) <= limits.num_tokens
        assert sum(len(own.logits) for own in sequences) <= limits.num_logits >= len(sequences)
        for own in sequences:
            assert own.start % BLOCK == 0
            for place, token in enumerate(own.ids, own.start):
                assert own.blocks[place // BLOCK] not in (0, *PREFIX.blocks)
                cache[own.blocks[place // BLOCK], place % BLOCK] = token
        for own in sequences:
            read = cache[list(own.blocks)].reshape(-1).tolist()
            for logit, place in zip(own.logits.tolist(), own.places.tolist(), strict=True):
                assert (own.row, logit) not in found
                found[own.row, logit] = read[: own.start + place + 1]
    for number, row in enumerate(rows):
        assert [found.pop((number, logit)) for logit in range(len(row.logit_positions))] == contexts(row)
    assert not found


def test_a_prompt_is_computed_once_for_its_candidates_but_for_its_last_block() -> None:
    row, _ = make_row(ints(*range(10)), [ints(1), ints(2, 3), ints(4, 5, 6)])
    ((prompt, *branches),) = plan_passes([row], Prefix(ints()), PassLimits.of(64, 64, 0, BLOCK))
    assert (prompt.ids.tolist(), [own.ids.tolist() for own in branches]) == (
        list(range(10)), [[8, 9, 2], [8, 9, 4, 5]],
    )  # fmt: skip
    assert [own.blocks[:2] for own in branches] == [prompt.blocks[:2]] * 2


def test_labels_of_one_token_cost_nothing_but_the_prompt() -> None:
    row, _ = make_row(ints(*PREFIX.ids, 5), [ints(1), ints(2)])
    ((only,),) = plan_passes([row], PREFIX, PassLimits.of(64, 64, len(PREFIX.ids), BLOCK))
    assert (only.ids.tolist(), only.start, only.blocks[:2]) == ([5], len(PREFIX.ids), PREFIX.blocks)


class Drawn(RandomWeights):
    """Made on `DEVICE`, so that all readers get the same."""

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        return super().load(name, DEVICE, shard).to(device)


def make(shape: DecoderShape, source: Drawn, **more: Any) -> CudaScoringRunner:
    options: dict[str, Any] = {"max_pass_tokens": 128, "device": str(DEVICE), "dtype": DTYPE, "plan": INVARIANT, **more}
    return CudaScoringRunner(source, shape, **options)


def wanted(reference: Reference, prompt: Ints, labels: list[Ints]) -> tuple[list[float], torch.Tensor]:
    """Log probabilities of the labels after the prompt, each text whole, and the prompt's logits."""
    found = []
    for label in labels:
        log_probs = torch.log_softmax(reference.logits([*prompt.tolist(), *label.tolist()]), -1)
        found += [float(log_probs[len(prompt) - 1 + index, token]) for index, token in enumerate(label)]
    return found, reference.logits(prompt.tolist())[-1]


def check(runner: CudaScoringRunner, source: Drawn, shape: DecoderShape, prompts: list[Ints], atol: float) -> None:
    reference = Reference(shape, source)
    labels = [tokens(7, 1), tokens(8, 3)]
    rows = [make_row(prompt, labels)[0] for prompt in prompts]
    head = source.load("head", DEVICE).double()
    for prompt, found in zip(prompts, runner.score(rows), strict=True):
        log_probs, logits = wanted(reference, prompt, labels)
        np.testing.assert_allclose(found.log_probs, log_probs, atol=atol)
        own = torch.from_numpy(found.hidden).to(DEVICE).double() @ head.T
        np.testing.assert_allclose(own.cpu().numpy(), logits.cpu().numpy(), atol=atol)


def test_scores_are_those_of_whole_texts() -> None:
    source = Drawn(SHAPE, is_fp8=False, has_qkv_bias=True)
    runner = make(SHAPE, source)
    check(runner, source, SHAPE, [tokens(0, 3), tokens(1, 1)], 0.05 if HAS_GPU else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp8", "latent"])
def test_a_shared_prefix_changes_no_score(kind: str) -> None:
    shape = SHAPE if kind != "latent" else replace(SHAPE, latent=LATENT, num_kv_heads=2)
    source = Drawn(shape, is_fp8=kind == "fp8", has_qkv_bias=kind != "latent")
    prefix = tokens(5, 70)
    runner = make(shape, source, prefix=prefix.tolist(), max_pass_tokens=16)
    prompts = [np.concatenate([prefix, tokens(2, 9)]), tokens(3, 2)]
    check(runner, source, shape, prompts, 0.2 if HAS_GPU else 2e-3)


@pytest.mark.slow
def test_a_built_artefact_scores_as_the_graph_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "qwen2", "bfloat16"))
    scoring = ScoringOptions(template="Is it so: {text}?", labels=("a", "b"), batching=Batching(max_batch_size=4))
    common: dict[str, Any] = {"task": "score", "max_seq_len": 48, "scoring": scoring}
    build(BuildOptions(checkpoint, "m", tmp_path / "models", target="cuda", precision="bf16", **common))
    build(BuildOptions(checkpoint, "o", tmp_path / "models", **common))
    assert check_repository(tmp_path / "models") == []
    monkeypatch.setattr(
        "deepseek_triton.ensemble.engine.runners.cuda.scoring.runner.CudaScoringRunner",
        lambda *arguments, **options: CudaScoringRunner(
            *arguments, **options, device=str(DEVICE), dtype=DTYPE, plan=INVARIANT
        ),
    )
    directory = tmp_path / "models" / "m-engine" / "1"
    ours = load_scoring_runner(directory, ScoringSettings(max_pass_tokens=32))
    graph = load_scoring_runner(tmp_path / "models" / "o-engine" / "1", ScoringSettings(num_threads=1))
    prefix = Manifest.load(directory).engine["prefix_ids"]
    assert (ours.vocab_size, ours.max_seq_len, len(prefix) > 5) == (graph.vocab_size, 48, True)
    rows = [make_row(ints(*prefix, *range(n)), [ints(5), ints(6, 7)])[0] for n in (2, 5)]
    for found, expected in zip(ours.score(rows), graph.score(rows), strict=True):
        np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=0.2 if HAS_GPU else 2e-3)
        np.testing.assert_allclose(found.hidden, expected.hidden, atol=0.1 if HAS_GPU else 2e-3)


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(RunnerError, match="torch sees no NVIDIA GPU"):
        CudaScoringRunner(Drawn(SHAPE, is_fp8=False, has_qkv_bias=False), SHAPE, max_pass_tokens=8)


def test_other_weights_are_refused() -> None:
    with pytest.raises(RunnerError, match="build the model again"):
        CudaScoringRunner(
            Drawn(SHAPE, is_fp8=False, has_qkv_bias=False), replace(SHAPE, num_layers=2), max_pass_tokens=8
        )
