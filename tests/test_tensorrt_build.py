"""Engines built for real with TensorRT for RTX, which needs no GPU to build."""

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

from builders.checkpoint import open_checkpoint
from builders.engine.build import EngineReport, build_engine
from builders.engine.errors import EngineError, GraphError, NotQuantizedError, UnsupportedGpuError
from builders.graph.decoder import build_graph
from tests.checkpoints import smollm2_path
from tests.tensorrt_graphs import (
    linear_modules,
    qwen_layer,
    rounded_to_nearest,
    small_spec,
    write_fp8_graph,
    write_graph,
)

pytest.importorskip("tensorrt_rtx", reason="pip install 'tensorrt-rtx>=1.7'", exc_type=ImportError)

SLOTS, CHUNK = 4, 32
COMPUTE_CAPABILITIES = ("8.9", "12.0")
MODULES = linear_modules(small_spec())


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Precision → a small graph in it."""
    directory = tmp_path_factory.mktemp("graphs")
    return {
        "fp32": write_graph(small_spec(), directory / "fp32", precision="fp32"),
        "fp16": write_graph(small_spec(), directory / "fp16"),
        "fp8": write_fp8_graph(small_spec(), directory / "fp8"),
        "fp8-dynamic": write_fp8_graph(small_spec(), directory / "fp8-dynamic", is_dynamic=True),
    }


def build(graph: Path, output: Path, **options: Any) -> EngineReport:
    defaults: dict[str, Any] = {
        "target": "tensorrt-rtx", "precision": "fp16", "num_slots": SLOTS, "prefill_chunk": CHUNK,
        "max_seq_len": 256, "compute_capability": "8.9",
    }  # fmt: skip
    return build_engine(graph, output, **{**defaults, **options})


def fp8_modules_of_plan(plan: bytes) -> set[str]:
    """Modules that the plan's own listing of kernels multiplies in FP8: both operands of that type.

    Detailed profiling makes TensorRT put the listing into the plan as text. The format is nobody's promise;
    this test alone reads it, because it tells without a GPU what was compiled.
    """
    text = plan.decode("latin-1")
    types: dict[str, str] = {}
    bases: dict[str, str] = {}
    for kind, body in re.findall(r"^\s*(tensor|sub_tensor)=\{ ([^\n]*)", text, re.MULTILINE):
        name = re.search(r' name="([^"]*)"', " " + body)
        found = re.search(r" type=([a-z0-9_]+)", body)
        if name and found:
            types[name[1]] = found[1]
        if kind == "sub_tensor" and name and (base := re.search(r'base="([^"]*)"', body)):
            bases[name[1]] = base[1]
    modules = set()
    for names, inputs in re.findall(r'fully_connected=\{ name="([^"]*)" output=\{[^}]*\} input=\{([^}]*)\}', text):
        operands = re.findall(r'"([^"]*)"', inputs)[:2]
        if all(types.get(operand) == "fp8_e4m3" for operand in operands):
            modules |= {re.sub(r"(\.scaled)?( \[profile \d+\])?_U\d+$", "", name) for name in names.split("+")}
    return modules


@pytest.mark.parametrize("compute_capability", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("kind", ["fp16", "fp8", "fp8-dynamic"])
def test_a_decoder_builds(kind: str, compute_capability: str, graphs: dict[str, Path], tmp_path: Path) -> None:
    precision = kind.partition("-")[0]
    expected = MODULES if precision == "fp8" else []
    report = build(
        graphs[kind], tmp_path / "model.plan",
        precision=precision, compute_capability=compute_capability, fp8_modules=expected,
    )  # fmt: skip
    census = report.census
    assert (census.attention, census.cache_updates, census.rotary_embeddings) == (2, 4, 4)
    assert list(census.fp8) == expected
    assert set(census.not_fp8) == ({"lm_head"} | set(MODULES)) - set(expected)
    assert report.plan_bytes == (tmp_path / "model.plan").stat().st_size > 2**20
    assert (report.plan.attention, report.plan.attention_is_fused) == ("lengths", True)
    assert report.plan.compute_capability == compute_capability
    assert report.layers is None  # no GPU here
    assert [path.name for path in tmp_path.iterdir()] == ["model.plan"]
    # Not only the network: the compiled program multiplies in FP8.
    assert fp8_modules_of_plan((tmp_path / "model.plan").read_bytes()) == set(expected)


def test_float32_is_built_from_single_operations(graphs: dict[str, Path], tmp_path: Path) -> None:
    report = build(graphs["fp32"], tmp_path / "model.plan", precision="fp32")
    assert (report.plan.attention, report.plan.attention_is_fused) == ("lengths", False)


def test_attention_without_a_kernel_of_its_own_is_broken_up(tmp_path: Path) -> None:
    graph = write_graph(small_spec(num_heads=2, num_kv_heads=1), tmp_path / "graph")
    report = build(graph, tmp_path / "model.plan")
    assert (report.plan.attention, report.plan.attention_is_fused) == ("lengths", False)


def test_a_graph_with_a_mask_of_another_kind_keeps_it(graphs: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(graphs["fp16"], load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["other_mask" if name == "mask" else name for name in node.input]
        node.output[:] = ["other_mask" if name == "mask" else name for name in node.output]
    other = graphs["fp16"].with_name("other.onnx")
    onnx.save(model, other)
    assert build(other, tmp_path / "model.plan").plan.attention == "mask"


def test_attention_gets_lengths_and_lower_right_causality(graphs: dict[str, Path]) -> None:
    from builders.engine.compile import read_graph
    from builders.engine.network import AttentionForm, Network, without_mask
    from builders.engine.target import resolve_target

    target = resolve_target("tensorrt-rtx", "fp16", "8.9")
    network = Network(target)
    network.parse(without_mask(read_graph(graphs["fp16"])), graphs["fp16"])
    network.set_attention(AttentionForm("lengths", True))
    attentions = network.attentions()
    assert len(attentions) == 2
    for attention in attentions:
        assert attention.causal_kind == target.api.CausalMaskKind.LOWER_RIGHT
        assert attention.key_value_lengths.dtype == target.api.DataType.INT32
        assert tuple(attention.key_value_lengths.shape) == (-1,)
        assert attention.mask is None and not attention.decomposable


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("R1-Distill-Qwen-7B", qwen_layer(3584, 18944, 28, 4)),
        ("R1-Distill-Qwen-32B", qwen_layer(5120, 27648, 40, 8)),
    ],
)
def test_one_layer_at_full_size_builds_in_fp8(name: str, spec: Any, tmp_path: Path) -> None:
    graph = write_fp8_graph(spec, tmp_path / "graph")
    modules = linear_modules(spec)
    report = build(graph, tmp_path / "model.plan", precision="fp8", compute_capability="12.0", fp8_modules=modules)
    assert (report.plan.attention, report.plan.attention_is_fused) == ("lengths", True)
    weights = sum(shape[0] * shape[1] for module, shape in spec.tensor_shapes().items() if "_proj.weight" in module)
    assert weights < report.plan_bytes < 1.2 * weights, "one byte a weight"


@pytest.mark.parametrize(("precision", "compute_capability"), [("fp16", "8.9"), ("fp8", "12.0")])
def test_the_whole_smollm2_builds(precision: str, compute_capability: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(smollm2_path())
    modules = linear_modules(checkpoint.spec) if precision == "fp8" else []
    (tmp_path / "graph").mkdir()
    graph = build_graph(
        checkpoint.spec, checkpoint.read, tmp_path / "graph", max_seq_len=512, precision="fp16",
        quantized=rounded_to_nearest(checkpoint.read) if modules else None,
    )  # fmt: skip
    reported: list[tuple[str, int, int]] = []
    report = build(
        graph, tmp_path / "model.plan", precision=precision, max_seq_len=512,
        compute_capability=compute_capability, fp8_modules=modules,
        progress=lambda *progress: reported.append(progress),
    )  # fmt: skip
    assert (report.census.attention, report.census.cache_updates, report.census.rotary_embeddings) == (
        30,
        60,
        60,
    )
    assert len(report.census.fp8) == len(modules) and "lm_head" in report.census.not_fp8
    assert (report.plan.attention, report.plan.attention_is_fused) == ("lengths", True)
    done = [step for _, step, _ in reported]
    assert done == sorted(set(done)) and done[-1] == 1000 and len(done) > 10


def test_progress_that_raises_stops_the_build(graphs: dict[str, Path], tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        raise OSError("the terminal has gone")

    with pytest.raises(OSError, match="the terminal has gone"):
        build(graphs["fp16"], tmp_path / "model.plan", progress=progress)
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
        build(graphs["fp16"], tmp_path / "model.plan", progress=progress)
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
        build(broken, plan)
    assert "\n" not in str(caught.value) and "Error Code" not in str(caught.value)
    assert plan.read_bytes() == b"an older plan" and len(list(tmp_path.iterdir())) == 1


def test_a_layer_that_is_not_fp8_though_the_recipe_says_so_is_an_error(graphs: dict[str, Path], tmp_path: Path) -> None:
    kept = "model.layers.1.mlp.down_proj"
    graph = write_fp8_graph(small_spec(), tmp_path / "graph", keep=(kept,))
    with pytest.raises(
        NotQuantizedError, match=rf"{kept} is not FP8 in TensorRT's network, though the recipe says FP8;"
    ):
        build(graph, tmp_path / "model.plan", precision="fp8", fp8_modules=MODULES)
    assert not (tmp_path / "model.plan").exists()
    report = build(graph, tmp_path / "model.plan", precision="fp8", fp8_modules=[m for m in MODULES if m != kept])
    assert report.census.not_fp8 == (kept, "lm_head")


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
        ({"prefill_chunk": 512}, EngineError, "prefill_chunk is 512, must be at most max_seq_len 256"),
        ({"num_slots": 0}, EngineError, "num_slots is 0, must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(
    options: dict[str, Any], error: type[Exception], message: str, graphs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build(graphs["fp16"], tmp_path / "model.plan", **options)
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
        build(graphs["fp16"], tmp_path / "model.plan", target=target)
