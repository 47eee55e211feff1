"""The graph without a cache: its numbers on ONNX Runtime, its plan, and its configuration for Triton."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from builders.engine.errors import EngineError
from builders.engine.scoring import ScoringLimits, build_scoring_engine, scoring_config
from builders.engine.stateless import write_stateless
from builders.pbtxt import parse_text, to_text
from builders.spec import ModelSpec
from tests.tensorrt_graphs import linear_modules, small_spec, write_fp8_graph, write_graph

MAX_SEQ_LEN = 256
LIMITS = ScoringLimits(max_batch_size=6, max_seq_len=128, graph_seq_lens=(64, 128))


def write(spec: ModelSpec, directory: Path, precision: str, logits: str) -> Path:
    if precision == "fp8":
        return write_fp8_graph(spec, directory, logits=logits)
    return write_graph(spec, directory, precision=precision, logits=logits)


def run(path: Path, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options)
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[value.name] = np.zeros((len(feeds["input_ids"]), *value.shape[1:]), dtype)
    logits: np.ndarray[Any, Any] = session.run(["logits"], feeds)[0]
    return logits


@pytest.mark.parametrize("logits", ["last", "all"])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_its_logits_are_those_of_the_graph_with_a_cache(precision: str, logits: str, tmp_path: Path) -> None:
    spec = small_spec(qkv_bias=True, qk_norm=True)
    graph = write(spec, tmp_path, precision, logits)
    stateless = write_stateless(graph, graph.with_name("scoring.onnx"))
    ids, num_tokens = np.random.default_rng(0).integers(0, 320, (3, 20)), np.array([20, 7, 1])
    expected = run(graph, {"input_ids": ids, "start": np.zeros(3, np.int64), "num_tokens": num_tokens})
    found = run(stateless, {"input_ids": ids} | ({"num_tokens": num_tokens[:, None]} if logits == "last" else {}))
    np.testing.assert_allclose(found, expected, atol=1e-5 if precision == "fp32" else 2e-2)
    assert np.ptp(expected) > 0.5
    assert not [name for name in names(stateless) if "past" in name or "present" in name or name == "mask"]


def names(path: Path) -> set[str]:
    graph = onnx.load(path, load_external_data=False).graph
    return {name for node in graph.node for name in (*node.input, *node.output)} | {value.name for value in graph.input}


def test_padding_changes_nothing_before_it(tmp_path: Path) -> None:
    graph = write_graph(small_spec(), tmp_path, precision="fp32")
    stateless = write_stateless(graph, tmp_path / "scoring.onnx")
    ids = np.random.default_rng(0).integers(0, 320, (1, 9))
    alone = run(stateless, {"input_ids": ids, "num_tokens": np.array([[9]])})
    padded = np.concatenate([ids, np.zeros((1, 7), np.int64)], axis=1)
    np.testing.assert_allclose(run(stateless, {"input_ids": padded, "num_tokens": np.array([[9]])}), alone, atol=1e-5)


def test_a_graph_that_is_not_a_decoder_with_a_cache_is_refused(tmp_path: Path) -> None:
    graph = write_graph(small_spec(), tmp_path, opset=23)
    with pytest.raises(EngineError, match="is not a decoder's graph with a cache in opset 24"):
        write_stateless(graph, tmp_path / "scoring.onnx")
    with pytest.raises(EngineError, match="must lie beside"):
        write_stateless(graph, tmp_path.parent / "scoring.onnx")


@pytest.mark.parametrize("logits", ["last", "all"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
def test_it_builds(precision: str, logits: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'tensorrt-rtx>=1.7'", exc_type=ImportError)
    graph = write(small_spec(), tmp_path, precision, logits)
    stateless = write_stateless(graph, graph.with_name("scoring.onnx"))
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
    graph = write_graph(small_spec(), tmp_path)
    stateless = write_stateless(graph, tmp_path / "scoring.onnx")
    with pytest.raises(EngineError, match="max_seq_len is 257, the graph has 256 positions"):
        build_scoring_engine(
            stateless, tmp_path / "model.plan", ScoringLimits(1, 257),
            target="tensorrt-rtx", precision="fp16", compute_capability="8.9",
        )  # fmt: skip


@pytest.mark.parametrize("logits", ["last", "all"])
def test_the_configuration_fits_the_plan(logits: str, tmp_path: Path) -> None:
    graph = write_graph(small_spec(), tmp_path, logits=logits)
    stateless = write_stateless(graph, tmp_path / "scoring.onnx")
    config = parse_text(to_text(scoring_config("scorer", stateless, LIMITS, target="tensorrt")), tmp_path)
    assert (config.platform, config.max_batch_size, config.default_model_filename) == (
        "tensorrt_plan",
        6,
        "model.plan",
    )
    assert config.HasField("dynamic_batching") and list(config.instance_group[0].profile) == ["0"]
    inputs = {tensor.name: list(tensor.dims) for tensor in config.input}
    assert inputs == {"input_ids": [-1]} | ({"num_tokens": [1]} if logits == "last" else {})
    assert list(config.output[0].dims) == ([320] if logits == "last" else [-1, 320])
    shapes = {(spec.batch_size, *spec.input["input_ids"].dim) for spec in config.optimization.cuda.graph_spec}
    assert shapes == {(batch, length) for batch in (1, 2, 4, 6) for length in (64, 128)}
    profile = LIMITS.profile()
    for spec in config.optimization.cuda.graph_spec:
        assert set(spec.input) == set(inputs)
        assert profile.batch[0] <= spec.batch_size <= profile.batch[2]
        assert profile.seq_len[0] <= spec.input["input_ids"].dim[0] <= profile.seq_len[2]


def test_no_cuda_graphs_where_no_length_is_named(tmp_path: Path) -> None:
    stateless = write_stateless(write_graph(small_spec(), tmp_path), tmp_path / "scoring.onnx")
    assert not scoring_config("scorer", stateless, ScoringLimits(2, 64), target="tensorrt").HasField("optimization")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"graph_seq_lens has 65, outside the plan's profile 1 … 64"):
        ScoringLimits(2, 64, (65,))
    with pytest.raises(EngineError, match="max_batch_size is 0"):
        ScoringLimits(0, 64)
    stateless = write_stateless(write_graph(small_spec(), tmp_path), tmp_path / "scoring.onnx")
    with pytest.raises(EngineError, match="loads plans of target tensorrt only, not tensorrt-rtx's"):
        scoring_config("scorer", stateless, LIMITS, target="tensorrt-rtx")
