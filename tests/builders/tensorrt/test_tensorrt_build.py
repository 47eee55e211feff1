"""Engines built for real with TensorRT for RTX, which needs no GPU to build."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.graph.decoder import build_graph
from tests.support.checkpoints import smollm2_path
from tests.support.tensorrt_graphs import (
    build_small,
    linear_modules,
    qwen_layer,
    rounded_to_nearest,
    small_spec,
    write_fp8_graph,
    write_graph,
)

pytest.importorskip("tensorrt_rtx", reason="pip install 'tensorrt-rtx>=1.7'", exc_type=ImportError)
pytestmark = pytest.mark.slow

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
    report = build_small(
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


@pytest.mark.parametrize("level", [0, None])
def test_tensorrt_gets_the_optimisation_level_and_counts_the_same_layers(
    level: int | None, graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    build = sys.modules["tensorrt_rtx"].Builder.build_serialized_network

    def serialized(self: Any, network: Any, config: Any) -> Any:
        given.append(config.builder_optimization_level)
        return build(self, network, config)

    monkeypatch.setattr(sys.modules["tensorrt_rtx"].Builder, "build_serialized_network", serialized)
    report = build_small(
        graphs["fp8"], tmp_path / "model.plan",
        precision="fp8", fp8_modules=MODULES, optimization_level=level,
    )  # fmt: skip
    assert given == [3 if level is None else level]
    assert list(report.census.fp8) == MODULES


def test_float32_is_built_from_single_operations(graphs: dict[str, Path], tmp_path: Path) -> None:
    report = build_small(graphs["fp32"], tmp_path / "model.plan", precision="fp32")
    assert (report.plan.attention, report.plan.attention_is_fused) == ("lengths", False)


def test_attention_without_a_kernel_of_its_own_is_broken_up(tmp_path: Path) -> None:
    graph = write_graph(small_spec(num_heads=2, num_kv_heads=1), tmp_path / "graph")
    report = build_small(graph, tmp_path / "model.plan")
    assert (report.plan.attention, report.plan.attention_is_fused) == ("lengths", False)


def test_a_graph_with_a_mask_of_another_kind_keeps_it(graphs: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(graphs["fp16"], load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["other_mask" if name == "mask" else name for name in node.input]
        node.output[:] = ["other_mask" if name == "mask" else name for name in node.output]
    other = graphs["fp16"].with_name("other.onnx")
    onnx.save(model, other)
    assert build_small(other, tmp_path / "model.plan").plan.attention == "mask"


def test_a_tensorrt_without_lower_right_causality_gets_the_mask(
    graphs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {name: value for name, value in vars(sys.modules["tensorrt_rtx"]).items() if name != "CausalMaskKind"}
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(**names))
    report = build_small(graphs["fp16"], tmp_path / "model.plan")
    assert (report.plan.attention, report.plan.attention_is_fused) == ("mask", True)


def test_attention_gets_lengths_and_lower_right_causality(graphs: dict[str, Path]) -> None:
    from deepseek_triton.builders.tensorrt.compile import read_graph
    from deepseek_triton.builders.tensorrt.compiler import resolve_target
    from deepseek_triton.builders.tensorrt.network import AttentionForm, Network, without_mask

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
    assert inputs_of(network.network, target.api, "key_value_lengths") == {"start", "input_ids"}


def test_greedy_decoding_gets_one_token_a_row(graphs: dict[str, Path]) -> None:
    from deepseek_triton.builders.tensorrt.compile import read_graph
    from deepseek_triton.builders.tensorrt.compiler import resolve_target
    from deepseek_triton.builders.tensorrt.network import Network

    target = resolve_target("tensorrt-rtx", "fp16", "8.9")
    network = Network(target)
    network.parse(read_graph(graphs["fp16"]), graphs["fp16"])
    network.add_best_token()
    outputs = network.outputs()
    found = {name: (tuple(outputs[name].shape), outputs[name].dtype.name) for name in ("best_id", "best_log_prob")}
    assert found == {"best_id": ((-1, 1), "INT32"), "best_log_prob": ((-1, 1), "FLOAT")}


def inputs_of(network: Any, api: Any, name: str) -> set[str]:
    """The inputs that are added up to the tensor `name`; input_ids counts by its second dimension only."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    if name not in producers:
        return {name}
    layer = producers[name]
    if layer.type == api.LayerType.ELEMENTWISE:
        layer.__class__ = api.IElementWiseLayer
        assert layer.op == api.ElementWiseOperation.SUM
    if layer.type == api.LayerType.SLICE:
        layer.__class__ = api.ISliceLayer
        assert (*layer.start, *layer.shape) == (1, 1)
    found = (inputs_of(network, api, layer.get_input(i).name) for i in range(layer.num_inputs))
    return set().union(*found)


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
    report = build_small(
        graph, tmp_path / "model.plan", precision="fp8", compute_capability="12.0", fp8_modules=modules
    )
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
    report = build_small(
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
