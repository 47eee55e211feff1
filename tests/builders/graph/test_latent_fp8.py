"""Latent attention and experts in FP8, one scale for each output channel, against transformers rounded alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.fp8.calibrate import Calibration, CalibrationError, calibrate
from deepseek_triton.builders.fp8.forward.layer import ArrayLayer
from deepseek_triton.builders.fp8.forward.layer_session import layer_session
from deepseek_triton.builders.fp8.forward.values import LayerValues
from deepseek_triton.builders.fp8.quantize import quantized_graph
from deepseek_triton.builders.fp8.quantizer import Quantizer
from deepseek_triton.builders.fp8.recipe import RECIPES
from deepseek_triton.builders.fp8.rounding.arrays import Arrays, best_arrays
from deepseek_triton.builders.fp8.rounding.e4m3 import least_weight_error_scale
from deepseek_triton.builders.fp8.rounding.experts import describe_few
from deepseek_triton.builders.fp8.weight_quantizer import WeightQuantizer
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from tests.builders.graph.test_parity import prompt
from tests.support.checkpoints import load_reference, make_checkpoint, make_tokenizer

torch = pytest.importorskip("torch")

# What the recipe rounds, by transformers' names; kv_b_proj, router, embedding and head stay float.
LINEARS = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


def rounded(weight: Any) -> Any:
    """A torch weight [out, in] as its codes stand for it."""
    arrays, values = best_arrays(), weight.detach().numpy().astype(np.float32)
    placed = arrays.place(values)
    scale = least_weight_error_scale(placed, np.dtype(np.float32), is_per_tensor=False, arrays=arrays)
    scale = np.broadcast_to(scale, len(values))
    return torch.from_numpy(arrays.encode_rows(placed, scale).astype(np.float32) * scale[:, None])


def linear(values: Any, weight: Any, is_float8: bool = True, bias: Any = None) -> Any:
    """A layer whose tokens are rounded to E4M3, each by its own scale."""
    if not is_float8:
        return values @ weight.T
    scale = torch.clamp(values.abs().amax(-1, keepdim=True) * torch.tensor(1 / 448), min=2.0**-14)
    product = ((values / scale).to(torch.float8_e4m3fn).float() @ weight.T) * scale
    return product if bias is None else product + bias


def round_reference(model: Any, kept: tuple[int, ...] = (), weight_of: Callable[[Any], Any] = rounded) -> None:
    """Let transformers' model compute as the recipe says; experts `kept` stay float. weight_of: rounds a weight."""

    def layer(module: Any) -> Callable[[Any], Any]:
        weight = weight_of(module.weight)
        return lambda values: linear(values, weight, bias=module.bias)

    def experts(module: Any) -> Callable[[Any, Any, Any], Any]:
        inputs, outputs = (
            [weight if number in kept else weight_of(weight) for number, weight in enumerate(stack)]
            for stack in (module.gate_up_proj, module.down_proj)
        )

        def forward(hidden: Any, chosen: Any, weights: Any) -> Any:
            total = torch.zeros_like(hidden)
            for number in range(len(inputs)):
                token, place = torch.where(chosen == number)
                gate, up = linear(hidden[token], inputs[number], number not in kept).chunk(2, -1)
                values = linear(torch.nn.functional.silu(gate) * up, outputs[number], number not in kept)
                total.index_add_(0, token, values * weights[token, place, None])
            return total

        return forward

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in LINEARS:
            module.forward = layer(module)
        elif name.endswith("mlp.experts"):
            module.forward = experts(module)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "kept"), [("v2-lite", ()), ("v3", ()), ("v3", (0, 2, 4, 6))])
def test_logits_are_those_of_transformers_with_the_same_rounding(
    option: str, kept: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", option)
    recipe = replace(RECIPES["fast"], keep=tuple(f"*.experts.{number}.*" for number in kept))
    path, _ = quantized_graph(open_checkpoint(checkpoint), recipe, None, tmp_path, max_seq_len=64, network="fp32")
    runner, ids = OnnxRunner(path, max_num_seqs=1, num_threads=2), prompt(41)
    found = runner.prefill(0, ids[:40], 0).copy(), runner.decode(ids[40:], np.array([40]))[0]
    reference = load_reference(checkpoint)
    with torch.no_grad():
        unrounded = reference(torch.tensor(ids)[None]).logits[0, 39:].numpy()
        round_reference(reference, kept)
        expected = reference(torch.tensor(ids)[None]).logits[0, 39:].numpy()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert np.abs(expected - unrounded).max() > 0.01, "rounding shows"


@pytest.mark.slow
@pytest.mark.parametrize("option", ["v2-lite", "v2-groups", "v3", "v3-stretched", "v3-halves", "v32-stretched"])
def test_a_layer_in_arrays_computes_what_its_graph_computes(option: str, tmp_path: Path) -> None:
    source = open_checkpoint(make_checkpoint(tmp_path / "checkpoint", option))
    ids = prompt(90)  # past the trained length of the stretched ones
    hidden = source.read("model.embed_tokens.weight")[ids].astype(np.float32)
    for layer in range(source.spec.num_layers):
        values = LayerValues(source.spec, layer, source.read, Arrays(), 128)
        taps = tuple(tap.value for tap in source.spec.taps(layer))
        with layer_session(source.spec, layer, source.read, max_seq_len=128, outputs=taps) as session:
            found, expected = ArrayLayer(values).run(hidden, taps), session.run(hidden, taps)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
        hidden = expected[0]


def error_of(source: Checkpoint, recipe: str, calibration: Calibration, directory: Path) -> float:
    """Of the logits, the mean square beside that of the float model's."""
    (directory / "float").mkdir(parents=True)
    path, _ = quantized_graph(source, RECIPES[recipe], calibration, directory, max_seq_len=128, network="fp32")
    float_path = build_graph(source.spec, source.read, directory / "float", max_seq_len=128, precision="fp32")
    logits = []
    for each in (path, float_path):
        runner = OnnxRunner(each, max_num_seqs=1, num_threads=2)
        logits.append(np.stack([runner.prefill(0, prompt(60, seed=seed), 0) for seed in range(20, 36)]))
    return float(np.mean((logits[0] - logits[1]) ** 2) / np.mean(logits[1] ** 2))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibration]:
    path = make_checkpoint(tmp_path_factory.mktemp("calibrated") / "checkpoint", "v3", num_hidden_layers=2)
    return path, calibrate(open_checkpoint(path), [prompt(120, seed=seed) for seed in range(8)])


def test_calibration_counts_the_tokens_of_each_expert(calibrated: tuple[Path, Calibration], tmp_path: Path) -> None:
    path, calibration = calibrated
    assert list(calibration.experts) == ["model.layers.1."]
    counts = calibration.experts["model.layers.1."]
    with torch.no_grad():
        model, chosen = load_reference(path), []
        model.model.layers[1].mlp.gate.register_forward_hook(lambda module, inputs, output: chosen.append(output))
        for seed in range(8):
            model(torch.tensor(prompt(120, seed=seed))[None])
    experts = torch.cat([next(part for part in output if part.dtype == torch.int64) for output in chosen])
    np.testing.assert_array_equal(counts, np.bincount(experts.reshape(-1).numpy(), minlength=8))
    calibration.save(tmp_path / "ranges.json")
    assert Calibration.load(tmp_path / "ranges.json") == calibration


@pytest.mark.slow
def test_calibrated_experts_are_nearer_to_the_float_model(calibrated: tuple[Path, Calibration], tmp_path: Path) -> None:
    path, calibration = calibrated
    errors = {
        recipe: error_of(open_checkpoint(path), recipe, calibration, tmp_path / recipe)
        for recipe in ("fast", "default")
    }
    few = replace(calibration, experts={"model.layers.1.": (0,) * 8})
    errors["few"] = error_of(open_checkpoint(path), "default", few, tmp_path / "few")
    assert errors["default"] < errors["few"] < errors["fast"], errors


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["static", "nearest", "nearest-per-tensor", "mixed"])
def test_every_recipe_builds_experts(recipe: str, calibrated: tuple[Path, Calibration], tmp_path: Path) -> None:
    path, calibration = calibrated
    assert error_of(open_checkpoint(path), recipe, calibration, tmp_path / recipe) < 0.2


def test_an_expert_that_saw_few_tokens_is_rounded_as_by_recipe_fast(calibrated: tuple[Path, Calibration]) -> None:
    path, calibration = calibrated
    counts = list(calibration.experts["model.layers.1."])
    counts[3] = 5
    few = replace(calibration, experts={"model.layers.1.": tuple(counts)})
    source = open_checkpoint(path)
    quantizer = Quantizer(source, RECIPES["default"], few)
    fast = WeightQuantizer(source.spec, RECIPES["fast"], source.reopened().read)
    quantizer.read("model.layers.0.input_layernorm.weight")
    fast.read("model.layers.0.input_layernorm.weight")
    for expert in range(8):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj"
        ours, theirs = quantizer.quantized(name), fast.quantized(name)
        assert ours is not None and theirs is not None and ours.bias is None
        is_same = bool((ours.weight.view(np.uint8) == theirs.weight.view(np.uint8)).all())
        assert is_same == (counts[expert] < 128), expert
    line = describe_few(few)
    assert line is not None and "model.layers.1.mlp.experts.3 (5)" in line and "of 8 experts saw fewer than 128" in line


def test_ranges_of_another_number_of_experts_are_refused(calibrated: tuple[Path, Calibration]) -> None:
    path, calibration = calibrated
    wrong: list[dict[str, tuple[int, ...]]] = [{}, {"model.layers.1.": (200,) * 6}]
    for experts in wrong:
        with pytest.raises(CalibrationError, match="experts in layer 1, 8 are needed"):
            Quantizer(open_checkpoint(path), RECIPES["default"], replace(calibration, experts=experts))


@pytest.mark.slow
def test_a_build_tells_of_experts_that_saw_few_tokens(tmp_path: Path) -> None:
    checkpoint, said = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "v3")), list[str]()
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    options = BuildOptions(
        checkpoint, "m", tmp_path / "models", precision="fp8", max_seq_len=64, recipe="default", calibration_text=text
    )
    build(options, say=said.append)
    assert any("experts saw fewer than 128 tokens of the calibration's text" in line for line in said)
    runner = OnnxRunner(tmp_path / "models" / "m-engine" / "1" / "model.onnx", max_num_seqs=1, num_threads=2)
    assert np.isfinite(runner.prefill(0, prompt(40), 0)).all()
