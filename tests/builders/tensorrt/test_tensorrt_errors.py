"""Failed and interrupted TensorRT builds: an error of one line, and no partial files."""

from __future__ import annotations

import _thread
import re
import sys
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from deepseek_triton.builders.tensorrt.errors import EngineError, GraphError, NotQuantizedError, UnsupportedGpuError
from tests.support.tensorrt_graphs import build_small, linear_modules, small_spec, write_fp8_graph, write_graph

pytest.importorskip("tensorrt_rtx", reason="pip install 'tensorrt-rtx>=1.7'", exc_type=ImportError)

MODULES = linear_modules(small_spec())


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Precision → a small graph in it."""
    directory = tmp_path_factory.mktemp("graphs")
    return {
        "fp16": write_graph(small_spec(), directory / "fp16"),
        "fp8": write_fp8_graph(small_spec(), directory / "fp8"),
    }


def test_progress_that_raises_stops_the_build(graphs: dict[str, Path], tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        raise OSError("the terminal has gone")

    with pytest.raises(OSError, match="the terminal has gone"):
        build_small(graphs["fp16"], tmp_path / "model.plan", progress=progress)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_stops_the_build(graphs: dict[str, Path], tmp_path: Path) -> None:
    is_interrupted = threading.Event()
    after: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if is_interrupted.is_set():
            after.append(done)
        elif done > 100:
            is_interrupted.set()
            _thread.interrupt_main()
            threading.Event().wait(0.3)  # the main thread looks every tenth of a second

    with pytest.raises(KeyboardInterrupt):
        build_small(graphs["fp16"], tmp_path / "model.plan", progress=progress)
    assert is_interrupted.is_set() and not after
    assert not list(tmp_path.iterdir())


def add_unsupported_node(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("StringSplit", ["input_ids"], ["a", "b"], "splitter"))


def break_types(model: onnx.ModelProto) -> None:
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("1.mlp.up_proj.weight"))
    weight.data_type = onnx.TensorProto.BFLOAT16  # as long as float16


def lose_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "gone.data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_unsupported_node, r"node splitter \(StringSplit\): unsupported node$"),
        (break_types, r"node model.layers.1.mlp.up_proj \(MatMul\): .*must have same input types"),
        (lose_weights, r"Failed to open file: .*gone.data$"),
    ],
)
def test_a_graph_that_tensorrt_cannot_read_names_the_node(
    change: Any, message: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    model = onnx.load(graphs["fp16"], load_external_data=False)
    change(model)
    broken = graphs["fp16"].with_name("broken.onnx")
    onnx.save(model, broken)
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"an older plan")
    with pytest.raises(GraphError, match=message) as caught:
        build_small(broken, plan)
    assert "\n" not in str(caught.value) and "Error Code" not in str(caught.value)
    assert plan.read_bytes() == b"an older plan" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_layer_that_is_not_fp8_though_the_recipe_says_so_is_an_error(graphs: dict[str, Path], tmp_path: Path) -> None:
    kept = "model.layers.1.mlp.down_proj"
    graph = write_fp8_graph(small_spec(), tmp_path / "graph", keep=(kept,))
    with pytest.raises(
        NotQuantizedError, match=rf"{kept} is not FP8 in TensorRT's network, though the recipe says FP8;"
    ):
        build_small(graph, tmp_path / "model.plan", precision="fp8", fp8_modules=MODULES)
    assert not (tmp_path / "model.plan").exists()
    report = build_small(graph, tmp_path / "model.plan", precision="fp8", fp8_modules=[m for m in MODULES if m != kept])
    assert report.census.not_fp8 == (kept, "lm_head")


def test_a_layer_whose_activations_are_not_fp8_is_an_error(graphs: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(graphs["fp8"], load_external_data=False)
    module = "model.layers.0.self_attn.o_proj"
    (matmul,) = (node for node in model.graph.node if node.name == module)
    matmul.input[0] = "model.layers.0.self_attn.attention_flat"
    path = graphs["fp8"].with_name("weights-only.onnx")
    onnx.save(model, path)
    with pytest.raises(NotQuantizedError, match=rf"{module} is not FP8"):
        build_small(path, tmp_path / "model.plan", precision="fp8", fp8_modules=MODULES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"precision": "fp8", "compute_capability": "8.6"},
            UnsupportedGpuError,
            "FP8 needs compute capability 8.9",
        ),
        (
            {"compute_capability": "9.0"},
            UnsupportedGpuError,
            "can't build for compute capability 9.0; it can for 7.5",
        ),
        (
            {"compute_capability": None},
            UnsupportedGpuError,
            "needs a GPU, and none is here; give a compute capability",
        ),
        ({"compute_capability": "ada"}, EngineError, "compute capability is 'ada', must look like 8.9"),
        ({"target": "cuda"}, EngineError, "target is 'cuda', must be one of tensorrt, tensorrt-rtx"),
        ({"precision": "int4"}, EngineError, "precision is 'int4', must be one of fp32, fp16, fp8"),
        ({"precision": "fp8"}, EngineError, "precision is fp8, but 0 of its 15 matrix multiplies are FP8"),
        ({"precision": "fp32"}, EngineError, "precision is fp32, the graph's is fp16"),
        ({"max_seq_len": 128}, EngineError, "max_seq_len is 128, the graph's cache holds 256"),
        (
            {"max_num_batched_tokens": 512},
            EngineError,
            "max_num_batched_tokens is 512, must be at most max_seq_len 256",
        ),
        ({"max_num_seqs": 0}, EngineError, "max_num_seqs is 0, must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(
    options: dict[str, Any], error: type[Exception], message: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build_small(graphs["fp16"], tmp_path / "model.plan", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "module", "command"),
    [
        ("tensorrt-rtx", "tensorrt_rtx", "pip install 'tensorrt-rtx>=1.7'"),
        ("tensorrt", "tensorrt", "pip install 'tensorrt>=10.15', or build in NVIDIA's Triton container"),
    ],
)
def test_no_tensorrt_is_told_with_the_install_command(
    target: str,
    module: str,
    command: str,
    graphs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError, match=re.escape(f"{module} is not installed; {command}")):
        build_small(graphs["fp16"], tmp_path / "model.plan", target=target)
