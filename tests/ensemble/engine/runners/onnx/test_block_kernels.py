"""The compiled products with weights in blocks: against NumPy, against their definition in the graph, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from deepseek_triton.builders.graph.blocks.linear import BlockLinear
from deepseek_triton.builders.graph.blocks.nodes import BlockNodes
from deepseek_triton.builders.graph.builder import GraphBuilder
from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.onnx import operators
from deepseek_triton.ensemble.engine.runners.onnx.session import open_session
from tests.support.block_layers import IN, KINDS, OUT, Float32, expected, inputs, layer, needs_kernels

OPSET = 23
# In a process of its own: how many resident bytes a session and a run of it add.
GROWTH = """
import sys
from pathlib import Path
import numpy as np
from deepseek_triton.ensemble.engine.runners.onnx.session import open_session
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
own = open_session(Path(sys.argv[1]), 1)
own.run(None, {"x": np.ones((1, 8192), np.float32)})
print(resident() - before)
"""


def session(linear: BlockLinear, directory: Path, *, num_threads: int = 1) -> ort.InferenceSession:
    with GraphBuilder(directory, "product", opset=OPSET) as graph:
        graph.input("x", TensorProto.FLOAT, ["rows", linear.shape[1]])
        BlockNodes(graph).matmul("x", "linear", linear, "y", has_rows=False)
        graph.output("y", TensorProto.FLOAT, ["rows", linear.shape[0]])
        path = graph.finish(producer="test", version="0", doc="")
    return open_session(path, num_threads)


def run(own: ort.InferenceSession, x: Float32) -> Float32:
    y: Float32 = own.run(None, {"x": x})[0]
    return y


@needs_kernels
@pytest.mark.parametrize(("bits", "block", "has_minima", "halves"), KINDS)
def test_a_product_is_exact_but_for_the_rounding_of_x(
    bits: int, block: int, has_minima: bool, halves: bool, tmp_path: Path
) -> None:
    linear, x = layer(bits, block, has_minima, halves), inputs(37)
    right = expected(linear, x)
    np.testing.assert_allclose(run(session(linear, tmp_path), x), right, rtol=0, atol=2e-6 * np.abs(right).max())


@needs_kernels
@pytest.mark.parametrize(("bits", "block", "has_minima", "halves"), KINDS)
def test_the_graphs_definition_gives_the_same(
    bits: int, block: int, has_minima: bool, halves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, x = layer(bits, block, has_minima, halves), inputs(19)
    own = run(session(linear, tmp_path), x)
    monkeypatch.setattr(operators, "library", lambda: None)
    np.testing.assert_allclose(run(session(linear, tmp_path), x), own, rtol=0, atol=1e-4 * np.abs(own).max())


@needs_kernels
@pytest.mark.parametrize(("bits", "block", "has_minima", "halves"), KINDS)
def test_all_instructions_give_the_same_bits(
    bits: int, block: int, has_minima: bool, halves: bool, tmp_path: Path, instructions: Callable[[int], int]
) -> None:
    if instructions(operators.AVX512) != operators.AVX512:
        pytest.skip("this processor has no AVX-512 with VNNI")
    own, x = session(layer(bits, block, has_minima, halves), tmp_path), inputs(37)
    whole = run(own, x)
    assert instructions(operators.AVX512 - 1) == operators.AVX512 - 1
    for count in (37, 1, 2, 3, 5):
        np.testing.assert_array_equal(run(own, x[:count]), whole[:count])


@needs_kernels
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("level", [operators.AVX512, operators.AVX512 - 1])
def test_a_row_with_numbers_that_are_not_finite_gives_none(
    number: float, level: int, tmp_path: Path, instructions: Callable[[int], int]
) -> None:
    own, x = session(layer(4, 32, False, True), tmp_path), inputs(5)
    right = run(own, x)
    instructions(level)
    x[2, 70] = number
    y = run(own, x)
    assert not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(right, 2, 0))


@needs_kernels
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_the_same_bits_whatever_rows_share_its_product(bits: int, num_threads: int, tmp_path: Path) -> None:
    # 4,096 wide: so many rows don't fit into a core's cache together, and many chunks of outputs go to threads.
    own = session(layer(bits, 32, True, False, (600, 4096)), tmp_path, num_threads=num_threads)
    x = inputs(300, 4096)
    whole = run(own, x)
    for count in range(1, 18):
        np.testing.assert_array_equal(run(own, x[count : 2 * count]), whole[count : 2 * count])


@needs_kernels
def test_no_rows_are_no_outputs(tmp_path: Path) -> None:
    assert run(session(layer(4, 32, True, True), tmp_path), inputs(0)).shape == (0, OUT)


@needs_kernels
@pytest.mark.slow
def test_weights_in_a_file_are_held_once(tmp_path: Path) -> None:
    session(layer(4, 32, False, True, (16384, 8192)), tmp_path)
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "product.onnx")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    panels = 16384 * 8192 * (0.5 + 2 / 32)
    assert panels < grown < 1.35 * panels  # the file's codes and scales alone are 1.11 of it


@needs_kernels
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"block_size": 64}, "blocks have 16 or 32 codes"),
        ({"bits": 2}, "of 4 or 8 bits"),
        ({"K": 100}, "K is a multiple"),
        ({"K": 320}, "shapes of codes"),
        ({"N": 90}, "shapes of codes"),
        ({"N": -75}, "sizes of blocks are positive"),
        ({"N": 2**60 + OUT}, "shapes of codes"),
        ({"block_size": 2**32 + 32}, "blocks have 16 or 32 codes"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused(attributes: dict[str, Any], message: str, tmp_path: Path) -> None:
    sizes = {"K": IN, "N": OUT, "bits": 4, "block_size": 32, **attributes}
    with pytest.raises(RunnerError, match=message):
        open_session(product(tmp_path, sizes), 1)


@needs_kernels
def test_an_input_of_another_width_is_refused(tmp_path: Path) -> None:
    own = open_session(product(tmp_path, {"K": IN, "N": OUT, "bits": 4, "block_size": 32}), 1)
    with pytest.raises(Exception, match="last axis isn't K"):
        own.run(None, {"x": inputs(2, 64)})


def product(directory: Path, sizes: dict[str, Any]) -> Path:
    """One node whose weights are those of `layer(4, 32, …)`, whatever `sizes` say."""
    linear = layer(4, 32, False, True)
    graph = helper.make_graph(
        [helper.make_node("BlockMatMul", ["x", "codes", "scale"], ["y"], domain="deepseek_triton", **sizes)],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", "outputs"])],
        [onnx.numpy_helper.from_array(linear.codes, "codes"), onnx.numpy_helper.from_array(linear.scale, "scale")],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid("deepseek_triton", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=11), directory / "model.onnx")
    return directory / "model.onnx"


@needs_kernels
def test_a_scale_whose_axes_are_swapped_is_refused(tmp_path: Path) -> None:
    path = product(tmp_path, {"K": IN, "N": OUT, "bits": 4, "block_size": 32})
    model = onnx.load(path)
    scale = onnx.numpy_helper.to_array(model.graph.initializer[1])
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(scale.T), "scale"))
    onnx.save(model, path)
    with pytest.raises(RunnerError, match="shapes of codes, scale and minimum don't fit"):
        open_session(path, 1)


@needs_kernels
def test_weights_that_are_no_files_stay(tmp_path: Path) -> None:
    """Given by the caller, in memory that is a changed copy of a file's."""
    own, linear = session(layer(4, 32, False, True, (256, 4096)), tmp_path), layer(4, 32, False, True, (256, 4096), 1)
    (tmp_path / "codes").write_bytes(np.zeros_like(linear.codes).tobytes())
    copy = np.memmap(tmp_path / "codes", np.uint8, "c", shape=linear.codes.shape)
    copy[:] = linear.codes
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(operators.LIBRARY))
    value = ort.OrtValue.ortvalue_from_numpy(copy)  # which must outlive the session
    options.add_initializer("linear.codes", value)
    other = ort.InferenceSession(str(tmp_path / "product.onnx"), options)
    assert not np.array_equal(run(own, inputs(1, 4096)), run(other, inputs(1, 4096)))
    np.testing.assert_array_equal(copy, linear.codes)


@needs_kernels
def test_the_library_shows_the_process_no_names_but_its_own() -> None:
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", operators.LIBRARY], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in shown.stdout.splitlines()} - {"_init", "_fini"}
    assert names == {"RegisterCustomOps", "blocks_instructions", "blocks_version"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "weren't compiled"), (b"no library", "can't be loaded"), (b"\x7fELF" + bytes(60), "can't be loaded")],
)
def test_without_a_sound_library_onnx_runtime_computes(
    content: bytes | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if content is not None:
        (tmp_path / "broken.so").write_bytes(content)
    monkeypatch.setattr(operators, "LIBRARY", tmp_path / "broken.so")
    operators.library.cache_clear()
    try:
        own = session(layer(4, 32, True, True), tmp_path)
        assert run(own, inputs(3)).shape == (3, OUT)
    finally:
        operators.library.cache_clear()
    assert reason in caplog.text
