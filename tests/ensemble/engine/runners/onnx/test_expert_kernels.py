"""The compiled experts in blocks: against NumPy, against their definition in the graph, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.builders.graph.blocks.experts import BlockExperts, joined
from deepseek_triton.builders.graph.blocks.linear import BlockLinear
from deepseek_triton.builders.graph.builder import GraphBuilder
from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.onnx import operators
from deepseek_triton.ensemble.engine.runners.onnx.session import open_session
from tests.support.block_layers import Float32, expected, inputs, layer, needs_kernels

OPSET = 23
HIDDEN, INNER, EXPERTS, CHOSEN = 96, 64, 7, 3
# Of gate and up, and of down: bits, block size, whether there are minima, whether scales are float16.
KINDS = [
    ((4, 32, False, True), (4, 32, False, True)),
    ((4, 32, True, False), (8, 16, False, False)),
    ((8, 16, False, False), (4, 16, True, True)),
    ((8, 32, True, True), (8, 32, True, False)),
]


def stacks(kinds: tuple[Any, Any]) -> tuple[list[BlockLinear], list[BlockLinear]]:
    (bits, block, has_minima, halves), (out_bits, out_block, has_out_minima, out_halves) = kinds
    return (
        [layer(bits, block, has_minima, halves, (2 * INNER, HIDDEN), seed) for seed in range(EXPERTS)],
        [layer(out_bits, out_block, has_out_minima, out_halves, (HIDDEN, INNER), 9 + seed) for seed in range(EXPERTS)],
    )


def session(
    first: list[BlockLinear], last: list[BlockLinear], directory: Path, *, num_threads: int = 1
) -> ort.InferenceSession:
    with GraphBuilder(directory, "experts", opset=OPSET) as graph:
        graph.input("tokens", TensorProto.FLOAT, ["n", HIDDEN])
        graph.input("weights", TensorProto.FLOAT, ["n", "k"])
        graph.input("chosen", TensorProto.INT64, ["n", "k"])
        y = BlockExperts(graph, "y", EXPERTS).add(("tokens", "weights", "chosen"), iter(first), iter(last))
        graph.output(y, TensorProto.FLOAT, ["n", HIDDEN])
        path = graph.finish(producer="test", version="0", doc="")
    return open_session(path, num_threads)


def values(n: int) -> dict[str, NDArray[Any]]:
    """Tokens that choose the seventh expert never."""
    random = np.random.default_rng(n)
    chosen = np.argsort(random.random((n, EXPERTS - 1)), axis=-1)[:, :CHOSEN]
    weights = random.random((n, CHOSEN), dtype=np.float32)
    return {"tokens": inputs(n, HIDDEN), "weights": weights, "chosen": chosen.astype(np.int64)}


def run(own: ort.InferenceSession, feeds: dict[str, NDArray[Any]]) -> Float32:
    y: Float32 = own.run(None, feeds)[0]
    return y


def right(first: list[BlockLinear], last: list[BlockLinear], feeds: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """One token after the other."""
    total = np.zeros((len(feeds["tokens"]), HIDDEN))
    for row, (token, weights, chosen) in enumerate(zip(*feeds.values(), strict=True)):
        for weight, expert in zip(weights, chosen, strict=True):
            gate, up = np.split(expected(first[expert], token[None]).astype(np.float32), 2, axis=-1)
            inner = gate / (1 + np.exp(-np.clip(gate, -80, 80))) * up
            total[row] += weight * expected(last[expert], inner)[0]
    return total


@needs_kernels
@pytest.mark.parametrize("kinds", KINDS)
def test_experts_are_exact_but_for_rounding(kinds: tuple[Any, Any], tmp_path: Path) -> None:
    first, last = stacks(kinds)
    feeds = values(40)
    wanted = right(first, last, feeds)
    error = np.abs(run(session(first, last, tmp_path), feeds) - wanted)
    # An intermediate value on the border of two codes may be rounded to either.
    assert error.max() < 0.01 * np.abs(wanted).max() and np.median(error) < 1e-5 * np.abs(wanted).max()


@needs_kernels
@pytest.mark.parametrize("kinds", KINDS)
def test_the_graphs_definition_gives_the_same(
    kinds: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = stacks(kinds)
    feeds = values(23)
    own = run(session(first, last, tmp_path), feeds)
    monkeypatch.setattr(operators, "library", lambda: None)
    # Weights that are no constants are multiplied in float32 by ONNX Runtime: tokens aren't rounded.
    other = run(session(first, last, tmp_path), feeds)
    cosine = (own * other).sum(-1) / np.linalg.norm(own, axis=-1) / np.linalg.norm(other, axis=-1)
    assert cosine.min() > 0.999


@needs_kernels
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("level", [operators.AVX512, operators.AVX512 - 1])
def test_a_token_has_the_same_bits_whatever_tokens_are_beside_it(
    level: int, num_threads: int, tmp_path: Path, instructions: Callable[[int], int]
) -> None:
    own = session(*stacks(KINDS[1]), tmp_path, num_threads=num_threads)
    feeds = values(90)
    whole = run(own, feeds)
    instructions(level)
    for start, end in ((0, 1), (1, 3), (3, 20), (20, 89), (89, 90)):
        part = run(own, {name: value[start:end] for name, value in feeds.items()})
        np.testing.assert_array_equal(part, whole[start:end])


@needs_kernels
def test_no_tokens_are_no_outputs(tmp_path: Path) -> None:
    assert run(session(*stacks(KINDS[0]), tmp_path), values(0)).shape == (0, HIDDEN)


@needs_kernels
@pytest.mark.parametrize("expert", [-1, EXPERTS])
def test_an_expert_that_is_not_there_is_an_error(expert: int, tmp_path: Path) -> None:
    feeds = values(5)
    feeds["chosen"][3, 1] = expert
    with pytest.raises(Exception, match="an expert that isn't there"):
        run(session(*stacks(KINDS[0]), tmp_path), feeds)


@needs_kernels
def test_tokens_that_choose_nobody_get_zeros(tmp_path: Path) -> None:
    own = session(*stacks(KINDS[0]), tmp_path)
    feeds = values(4)
    run(own, feeds)
    nobody = {**feeds, "weights": np.zeros((4, 0), np.float32), "chosen": np.zeros((4, 0), np.int64)}
    np.testing.assert_array_equal(run(own, nobody), np.zeros((4, HIDDEN), np.float32))


@needs_kernels
def test_threads_share_a_session(tmp_path: Path) -> None:
    own = session(*stacks(KINDS[1]), tmp_path, num_threads=2)
    feeds = [values(n) for n in (1, 7, 40)]
    alone = [run(own, each) for each in feeds]
    with ThreadPoolExecutor(4) as pool:
        for number, y in enumerate(pool.map(partial(run, own), feeds * 20)):
            np.testing.assert_array_equal(y, alone[number % 3])


@needs_kernels
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("in_block_size", 2**32, "blocks have 16 or 32 codes"),
        ("out_bits", 5, "of 4 or 8 bits"),
        ("num_experts", EXPERTS + 1, "shapes of codes"),
        ("gate_up_size", 2 * INNER + 2, "as wide as down's input"),
        ("in_minimum", 1, "shapes of codes"),
    ],
)
def test_experts_that_do_not_fit_are_refused(attribute: str, value: int, message: str, tmp_path: Path) -> None:
    session(*stacks(KINDS[0]), tmp_path)
    path = tmp_path / "experts.onnx"
    model = onnx.load(path)
    for own in model.graph.node[0].attribute:
        if own.name == attribute:
            own.i = value
    for tensor in model.graph.initializer:
        if tensor.name.endswith(attribute.replace("_", ".")):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, value, np.float32), tensor.name))
    onnx.save(model, path)
    with pytest.raises(RunnerError, match=message):
        open_session(path, 1)


def test_gate_and_up_of_different_kinds_become_bytes() -> None:
    gate, up = layer(4, 32, True, True), layer(8, 16, False, False)
    whole = joined(gate, up)
    assert (whole.bits, whole.block_size) == (8, 16)
    parts = np.concatenate([gate.dequantized(), up.dequantized()])
    np.testing.assert_allclose(whole.dequantized(), parts, rtol=1e-6, atol=1e-6)


def test_experts_of_different_kinds_are_refused(tmp_path: Path) -> None:
    first, last = stacks(KINDS[0])
    first[3] = layer(8, 32, False, True, shape=(2 * INNER, HIDDEN))
    with pytest.raises(CheckpointError, match="stored in different forms; try --precision int8"):
        session(first, last, tmp_path)
