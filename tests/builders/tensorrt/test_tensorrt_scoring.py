"""The graph without a cache: its numbers on ONNX Runtime, its plan, and its configuration for Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.json_format import MessageToDict

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.graph.decoder import ScoringMode
from deepseek_triton.builders.repository.pbtxt import parse_text, score_engine_config, score_plan_config, to_text
from deepseek_triton.builders.scoring.options import Batching
from deepseek_triton.builders.tensorrt.errors import EngineError
from deepseek_triton.builders.tensorrt.scoring import ScoringLimits, build_scoring_engine
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.protocol.contract import HIDDEN_STATE, SCORE_ROW, TOKEN_LOG_PROBS
from deepseek_triton.ensemble.scoring.rows import (
    LOGIT_COUNTS,
    LONGEST_ROW,
    ROW_LENS,
    TARGET_COUNTS,
    ScoreRow,
    batch_tensors,
    make_row,
    split_rows,
    stack_rows,
)
from tests.support.tensorrt_graphs import linear_modules, small_spec, write_fp8_graph, write_graph

LIMITS = ScoringLimits(max_batch_size=6, max_seq_len=128)
VOCAB_SIZE = 320
Floats = np.ndarray[Any, Any]


def write(spec: ModelSpec, directory: Path, precision: str, scoring: ScoringMode | None = None) -> Path:
    if precision == "fp8":
        return write_fp8_graph(spec, directory, scoring=scoring)
    return write_graph(spec, directory, precision=precision, scoring=scoring)


def session(path: Path) -> Any:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options)


class Reference:
    """The graph with a cache, one sequence at a time."""

    def __init__(self, path: Path) -> None:
        self._session = session(path)
        self._caches = {
            value.name: np.zeros((1, *value.shape[1:]), np.float16 if "float16" in value.type else np.float32)
            for value in self._session.get_inputs()
            if value.name.startswith("past_")
        }

    def log_probs(self, ids: list[int]) -> Floats:
        """Of every next token [vocab_size]."""
        feeds = {"input_ids": [ids], "start": [0], "num_tokens": [len(ids)]}
        arrays = {name: np.array(values, np.int64) for name, values in feeds.items()}
        logits = self._session.run(["logits"], arrays | self._caches)[0][0].astype(np.float64)
        log_probs: Floats = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        return log_probs


def score(path: Path, rows: list[ScoreRow]) -> tuple[Floats, Floats]:
    log_probs, hidden = session(path).run([TOKEN_LOG_PROBS.name, HIDDEN_STATE.name], batch_tensors(rows))
    return log_probs, hidden


def random_ids(seed: int, *lengths: int) -> list[Any]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB_SIZE, length).astype(np.int32) for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_each_target_has_the_log_probability_that_it_has_after_its_own_tokens_alone(
    precision: str, tmp_path: Path
) -> None:
    spec = small_spec(qkv_bias=True, qk_norm=True)
    stateless = write(spec, tmp_path / "scoring", precision, ScoringMode())
    reference = Reference(write(spec, tmp_path / "cached", precision))
    prompts = random_ids(0, 20, 7, 1)
    candidates = [random_ids(1, 1, 3), random_ids(2, 2, 2, 4, 1), random_ids(3, 5)]
    rows = [make_row(prompt, own)[0] for prompt, own in zip(prompts, candidates, strict=True)]
    expected = [
        reference.log_probs([*prompt, *candidate[:index]])[candidate[index]]
        for prompt, own in zip(prompts, candidates, strict=True)
        for candidate in own
        for index in range(len(candidate))
    ]
    found, hidden = score(stateless, rows)
    np.testing.assert_allclose(found, expected, atol=1e-5 if precision == "fp32" else 2e-2)
    assert np.ptp(expected) > 0.5
    assert hidden.shape == (3, 128) and np.ptp(hidden) > 0.5
    assert not [name for name in names(stateless) if "past_" in name or "present_" in name]


def names(path: Path) -> set[str]:
    graph = onnx.load(path, load_external_data=False).graph
    return {name for node in graph.node for name in (*node.input, *node.output)} | {value.name for value in graph.input}


@pytest.mark.slow
def test_a_row_scores_the_same_alone_in_a_batch_and_padded_within_a_request(tmp_path: Path) -> None:
    stateless = write_graph(small_spec(), tmp_path, precision="fp32", scoring=ScoringMode())
    made = [make_row(prompt, random_ids(4, 1, 2)) for prompt in random_ids(5, 3, 40, 11)]
    rows = [row for row, _ in made]
    alone = [score(stateless, [row]) for row in rows]
    together, hidden = score(stateless, rows)
    np.testing.assert_allclose(together, np.concatenate([log_probs for log_probs, _ in alone]), atol=1e-5)
    np.testing.assert_allclose(hidden, np.concatenate([own for _, own in alone]), atol=1e-4)
    # A plan gets a request's rows as they are stacked: each as long as the request's longest, padding and all.
    stacked = stack_rows(made)
    padded = [ScoreRow(*(stacked[spec.name][i] for spec in SCORE_ROW)) for i in range(3)]
    np.testing.assert_allclose(score(stateless, padded)[0], together, atol=1e-5)
    assert [len(row) for row in split_rows(stacked)] == [len(row) for row in rows]


def test_the_batch_is_padded_to_its_longest_row_and_no_further(tmp_path: Path) -> None:
    stateless = write_graph(small_spec(), tmp_path, precision="fp32", scoring=ScoringMode())
    model = onnx.load(stateless)
    looked_at = {"mask": "BOOL", "padded_places": "INT64", "model.layers.0.mlp_residual": "FLOAT"}
    for name, dtype in looked_at.items():
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DataType.Value(dtype), None)
        model.graph.output.append(value)
    onnx.save(model, tmp_path / "opened.onnx")
    rows = [make_row(prompt, random_ids(6, 1, 1))[0] for prompt in random_ids(7, 2, 9, 5)]
    feeds = batch_tensors(rows)
    mask, places, hidden = session(tmp_path / "opened.onnx").run(list(looked_at), feeds)
    assert mask.shape == (3, 1, 9, 9) and hidden.shape == (1, 2 + 9 + 5, 128), "attention alone is padded"
    for line, row in zip(places, rows, strict=True):
        assert feeds["input_ids"][line[: len(row)]].tolist() == row.input_ids.tolist()


def test_a_scoring_graph_in_another_opset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="needs opset 24, not 23"):
        write_graph(small_spec(), tmp_path, opset=23, scoring=ScoringMode())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
def test_it_builds(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'tensorrt-rtx>=1.7'", exc_type=ImportError)
    stateless = write(small_spec(), tmp_path, precision, ScoringMode())
    modules = linear_modules(small_spec()) if precision == "fp8" else []
    report = build_scoring_engine(
        stateless, tmp_path / "model.plan", LIMITS,
        target="tensorrt-rtx", precision=precision, compute_capability="8.9", fp8_modules=modules,
    )  # fmt: skip
    assert (report.census.attention, report.census.cache_updates) == (2, 0)
    assert list(report.census.fp8) == modules
    assert report.plan_bytes == (tmp_path / "model.plan").stat().st_size > 2**19


def test_a_profile_longer_than_the_positions_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'tensorrt-rtx>=1.7'", exc_type=ImportError)
    stateless = write_graph(small_spec(), tmp_path, scoring=ScoringMode())
    with pytest.raises(EngineError, match="max_seq_len is 257, the graph has 256 positions"):
        build_scoring_engine(
            stateless, tmp_path / "model.plan", ScoringLimits(1, 257),
            target="tensorrt-rtx", precision="fp16", compute_capability="8.9",
        )  # fmt: skip


def test_the_plans_tensors_are_those_of_the_engine_on_a_cpu(tmp_path: Path) -> None:
    batching = Batching(max_batch_size=6, preferred_batch_sizes=(4,), max_queue_delay_us=950, max_queue_size=9)
    configs = (score_plan_config("s", 128, batching), score_engine_config("s", 128, batching, {}))
    plan, python = (MessageToDict(parse_text(to_text(config), tmp_path)) for config in configs)
    for key in ("name", "input", "output", "maxBatchSize", "dynamicBatching"):
        assert plan[key] == python[key]
    assert (plan["platform"], python["backend"]) == ("tensorrt_plan", "python")
    assert plan["dynamicBatching"] == {
        "preferredBatchSize": [4, 6],
        "maxQueueDelayMicroseconds": "700",
        "defaultQueuePolicy": {"allowTimeoutOverride": True, "maxQueueSize": 9},
    }
    assert all(tensor["allowRaggedBatch"] for tensor in plan["input"])


def test_the_plans_inputs_are_the_requests_and_what_triton_adds_to_the_batch(tmp_path: Path) -> None:
    stateless = write_graph(small_spec(), tmp_path, scoring=ScoringMode())
    config = score_plan_config("s", 128, Batching(max_batch_size=6))
    added = {entry.target_name[0]: entry.source_input[0] for entry in config.batch_input}
    assert added == {
        ROW_LENS: "input_ids",
        LOGIT_COUNTS: "logit_positions",
        TARGET_COUNTS: "target_ids",
        LONGEST_ROW: "input_ids",
    }
    graph = onnx.load(stateless, load_external_data=False).graph
    assert {value.name for value in graph.input} == {tensor.name for tensor in config.input} | set(added)
    assert {value.name for value in graph.output} == {tensor.name for tensor in config.output}
    assert [(entry.target_name[0], entry.source_input[0]) for entry in config.batch_output] == [
        ("token_log_probs", "target_ids")
    ]
    sizes = LIMITS.profile().sizes
    assert set(sizes) == {value.name for value in graph.input}
    assert all(low <= best <= high for low, best, high in sizes.values())
    assert sizes["input_ids"] == (1, 6 * 32, 6 * 128) and sizes[LONGEST_ROW] == (1, 32, 128)


def test_limits_that_no_plan_can_have(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="max_batch_size is 0"):
        ScoringLimits(0, 64)
