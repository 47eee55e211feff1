"""FP8: arithmetic, graphs, and the methods that improve on rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError
from deepseek_triton.builders.fp8.calibrate import Calibration, CalibrationError, calibrate
from deepseek_triton.builders.fp8.forward.layer_session import runnable_opset
from deepseek_triton.builders.fp8.quality.evaluate import FloatSource, compare, run_model
from deepseek_triton.builders.fp8.quality.graph_weights import Artefact
from deepseek_triton.builders.fp8.quality.sensitivity import float8_bytes, keep_most_sensitive, measure_sensitivity
from deepseek_triton.builders.fp8.quantize import quantized_graph
from deepseek_triton.builders.fp8.quantizer import Quantizer
from deepseek_triton.builders.fp8.recipe import RECIPES, Recipe, recipe_named
from deepseek_triton.builders.fp8.rounding.compensate import SecondMoment, compensated_codes
from deepseek_triton.builders.fp8.rounding.e4m3 import encode, least_error_scale, max_scale, round_trip
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.graph.float8 import E4M3
from tests.support.checkpoints import OPTIONS, make_checkpoint

Array = np.ndarray[Any, Any]
NEAREST = RECIPES["nearest"]
FLOAT32 = np.dtype(np.float32)
DOWN_1 = "model.layers.1.mlp.down_proj"


def windows(num: int = 4, length: int = 64, seed: int = 0) -> list[Array]:
    return list(np.random.default_rng(seed).integers(0, 319, (num, length)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Calibration]]:
    made: dict[str, tuple[Path, Calibration]] = {}

    def prepare(option: str) -> tuple[Path, Calibration]:
        if option not in made:
            path = make_checkpoint(tmp_path_factory.mktemp(option) / "checkpoint", option)
            made[option] = path, calibrate(open_checkpoint(path), windows())
        return made[option]

    return prepare


@pytest.fixture
def llama(prepared: Callable[[str], tuple[Path, Calibration]]) -> tuple[Path, Calibration]:
    return prepared("llama")


def run_graph(path: Path, ids: Array) -> Array:
    """Logits [seq_len, vocab_size] of a graph built with logits="all"."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids[None], "start": np.zeros(1, np.int64), "num_tokens": np.array([len(ids)])}
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            feeds[value.name] = np.zeros((1, *value.shape[1:]), dtype)
    logits: Array = session.run(["logits"], feeds)[0][0]
    return logits


def simulated(source: Any, checkpoint: Checkpoint, ids: Array) -> Array:
    final = run_model(source, checkpoint.spec, [ids])
    logits: Array = final.hidden[0] @ final.head.T
    return logits


# ---- numbers


def test_codes_are_those_of_onnx_quantize_linear() -> None:
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"])
    cast = helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "scale")]
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node, cast], "q", inputs, [output], [zero])
    model = helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 23)])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    grid = np.arange(-5000, 5001, dtype=np.float32) / 8  # every tie up to 625, beyond saturation too
    for values, scale in ((grid, 1.0), (grid / 1024, 1.0), (grid, 0.37)):
        (expected,) = session.run(None, {"x": values, "scale": np.array(scale, np.float32)})
        assert np.array_equal(encode(values, scale).astype(np.float32), expected)


def test_a_code_is_the_nearest_of_all_codes() -> None:
    every = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    every = every[np.isfinite(every)]
    values = np.random.default_rng(0).standard_normal(500).astype(np.float32) * np.float32(40)
    nearest = np.abs(values[:, None] - every).min(axis=1)
    np.testing.assert_array_equal(np.abs(round_trip(values, 1.0) - values), nearest)


def test_least_error_scales_are_never_worse_and_sometimes_better_than_the_maximums() -> None:
    random = np.random.default_rng(0)
    rows, importance = random.standard_normal((50, 64)).astype(np.float32), random.random(64)
    by_max = max_scale(np.abs(rows).max(axis=1), FLOAT32)
    best = least_error_scale(rows, importance, FLOAT32)

    def errors(scale: Array) -> Array:
        difference: Array = np.square(round_trip(rows, scale[:, None]) - rows) @ importance
        return difference

    assert (errors(best) <= errors(by_max) * (1 + 1e-6)).all()
    assert errors(best).sum() < 0.97 * errors(by_max).sum()


def test_a_scale_is_one_that_the_network_dtype_holds_even_for_zeros() -> None:
    scale = max_scale(np.array([0.0, 1e-9, 0.3, 1e6]), np.dtype(np.float16))
    assert np.array_equal(scale, scale.astype(np.float16).astype(np.float32)) and (scale > 0).all()


# ---- compensation


def test_compensation_without_correlation_is_rounding_to_nearest() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((20, 70)).astype(np.float32)
    moment = SecondMoment(70)
    moment.moments[0] += np.diag(random.random(70) + 0.5)
    scale = max_scale(np.abs(weight).max(axis=1), FLOAT32)
    codes = compensated_codes(weight, scale, moment)
    assert np.array_equal(codes.view(np.uint8), encode(weight, scale[:, None]).view(np.uint8))


@pytest.mark.parametrize("max_block", [4096, 50])
def test_compensation_reduces_the_outputs_error(max_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_triton.builders.fp8.rounding.compensate.MAX_BLOCK", max_block)
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 30)).astype(np.float32) @ random.standard_normal((30, 150)).astype(np.float32)
    x += 0.2 * random.standard_normal(x.shape).astype(np.float32)
    weight = random.standard_normal((40, 150)).astype(np.float32)
    scale = max_scale(np.abs(weight).max(axis=1), FLOAT32)
    moment = SecondMoment(150)
    for part in np.array_split(x, 3):
        moment.add(part)
    np.testing.assert_allclose(moment.diagonal(), np.mean(np.square(x), axis=0), rtol=1e-4)
    rounded, better = (
        codes.astype(np.float32) * scale[:, None]
        for codes in (encode(weight, scale[:, None]), compensated_codes(weight, scale, moment))
    )
    error, better_error = (np.linalg.norm((weight - approximate) @ x.T) for approximate in (rounded, better))
    assert better_error < 0.6 * error


# ---- the graph


CASES = [
    ("llama", Recipe()),
    ("llama", RECIPES["static"]),
    ("llama", RECIPES["nearest-per-tensor"]),
    ("llama", Recipe(keep=("*.1.mlp.*",))),
    ("qwen2", Recipe(activations="static", bias_correction=True, smoothing=0.5)),
    ("qwen3", NEAREST),
    ("llama-mha-tied", replace(NEAREST, activations="dynamic", weights="per_tensor")),
    ("llama-biases", Recipe(smoothing=0.3)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("option", "recipe"), CASES)
def test_the_fp8_graph_gives_the_numbers_that_evaluation_simulates(
    option: str, recipe: Recipe, prepared: Any, tmp_path: Path
) -> None:
    path, calibration = prepared(option)
    checkpoint = open_checkpoint(path)
    graph, _ = quantized_graph(
        checkpoint, recipe, calibration, tmp_path,
        max_seq_len=32, network="fp32", opset=runnable_opset(), logits="all",
    )  # fmt: skip
    ids = windows(1, 32, seed=9)[0]
    real, fast = run_graph(graph, ids), simulated(Artefact(graph), checkpoint, ids)
    exact = simulated(FloatSource(checkpoint), checkpoint, ids)
    # A value on the border between two codes may fall either way: a few logits differ, far less than FP8 costs.
    assert np.median(np.abs(real - fast)) < 1e-4
    assert np.abs(real - fast).mean() < 0.05 * np.abs(real - exact).mean()
    cosine = np.sum(real * exact) / np.linalg.norm(real) / np.linalg.norm(exact)
    assert 0.9 < cosine < 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("opset", [23, 24])
def test_a_float16_network_stays_near_its_simulation(
    opset: int, llama: tuple[Path, Calibration], tmp_path: Path
) -> None:
    if opset > runnable_opset():
        pytest.skip("this ONNX Runtime has no opset 24")
    checkpoint = open_checkpoint(llama[0])
    graph, _ = quantized_graph(checkpoint, Recipe(), llama[1], tmp_path, max_seq_len=32, opset=opset, logits="all")
    ids = windows(1, 32, seed=9)[0]
    real, fast = run_graph(graph, ids), simulated(Artefact(graph), checkpoint, ids)
    exact = simulated(FloatSource(checkpoint), checkpoint, ids)
    # float16 moves values over the borders between codes: other roundings than the simulation's, of the same size.
    error, simulated_error = np.abs(real - exact).mean(), np.abs(fast - exact).mean()
    assert np.abs(real - fast).mean() < 0.8 * error
    assert error == pytest.approx(simulated_error, rel=0.2)


def test_linear_layers_are_stored_as_a_byte_a_weight(llama: tuple[Path, Calibration], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama[0])
    recipe = Recipe(keep=("model.layers.0.mlp.*", "*.k_proj"))
    path, _ = quantized_graph(checkpoint, recipe, llama[1], tmp_path, max_seq_len=32)
    graph = onnx.load(path, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for name in checkpoint.spec.tensor_shapes():
        is_fp8 = recipe.precision_of(name.removesuffix(".weight")) == "fp8"
        assert tensors[name].data_type == (TensorProto.FLOAT8E4M3FN if is_fp8 else TensorProto.FLOAT16), name
        if is_fp8:
            place = {entry.key: entry.value for entry in tensors[name].external_data}
            assert int(place["length"]) == np.prod(checkpoint.spec.tensor_shapes()[name])
    scales = [name for name in tensors if name.endswith("_scale")]
    assert scales and all(tensors[name].data_type == TensorProto.FLOAT16 for name in scales)
    quantized = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantized) == 10, "one for each input that some FP8 layer reads; none over a weight"


@pytest.mark.slow
def test_a_build_is_reproducible_and_has_the_float_builds_digest(
    llama: tuple[Path, Calibration], prepared: Any, tmp_path: Path
) -> None:
    for option in ("llama", "qwen3", "llama-biases"):
        path, calibration = prepared(option)
        recipe = Recipe(extra_bytes=0.05 if option == "llama" else 0.0)
        built = []
        for i in range(2):
            directory = tmp_path / f"{option}{i}"
            directory.mkdir()
            checkpoint = open_checkpoint(path)
            graph, _ = quantized_graph(checkpoint, recipe, calibration, directory, max_seq_len=16)
            built.append((graph.read_bytes(), graph.with_name("model.onnx.data").read_bytes(), checkpoint.digest()))
        assert built[0] == built[1]
        reference = open_checkpoint(path)
        build_graph(reference.spec, reference.read, tmp_path, max_seq_len=16)
        assert reference.digest() == built[0][2]


# ---- smoothing, sensitivity


@pytest.mark.slow
@pytest.mark.parametrize("option", ["llama", "qwen2", "llama-biases", "qwen3"])
def test_smoothing_changes_the_weights_and_not_the_model(option: str, prepared: Any) -> None:
    path, calibration = prepared(option)
    smoothed = Quantizer(
        open_checkpoint(path), replace(NEAREST, smoothing=0.5, keep=("*",)), calibration, network="fp32"
    )
    checkpoint = open_checkpoint(path)
    ids = windows(1, 32, seed=5)[0]
    np.testing.assert_allclose(
        simulated(smoothed, checkpoint, ids), simulated(FloatSource(checkpoint), checkpoint, ids), atol=2e-3
    )
    weights = Quantizer(open_checkpoint(path), replace(NEAREST, smoothing=0.5), calibration)
    for name in ("input_layernorm", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        full = f"model.layers.0.{name}.weight"
        assert not np.allclose(weights.read(full), checkpoint.read(full), rtol=0.01), name


@pytest.mark.slow
def test_the_ranking_finds_the_layer_that_suffers_and_the_budget_holds(llama: tuple[Path, Calibration]) -> None:
    path, calibration = llama
    tap = "model.layers.1.mlp.product"
    statistics = calibration.taps[tap]
    spoilt = replace(statistics, channel_amax=tuple(1e5 * v for v in statistics.channel_amax))
    damaged = replace(calibration, taps={**calibration.taps, tap: spoilt})
    checkpoint = open_checkpoint(path)
    ranking = measure_sensitivity(checkpoint, RECIPES["static"], damaged)
    assert len(ranking) == 4 * checkpoint.spec.num_layers
    assert ranking[0].modules == (DOWN_1,) and ranking[0].mean_kl > 2 * ranking[1].mean_kl
    whole = float8_bytes(checkpoint.spec, Recipe(), "fp16")
    for extra in (0.0, 0.05, 0.2, 1.0):
        chosen = keep_most_sensitive(checkpoint.spec, Recipe(extra_bytes=extra), ranking)
        assert float8_bytes(checkpoint.spec, chosen, "fp16") <= whole * (1 + extra)
        assert (chosen.precision_of(DOWN_1) == "network") == (extra > 0)


@pytest.mark.slow
def test_keeping_the_most_sensitive_layers_brings_the_model_nearer(
    llama: tuple[Path, Calibration], tmp_path: Path
) -> None:
    path, calibration = llama
    checkpoint, ids = open_checkpoint(path), windows(2, 64, seed=7)
    reference = run_model(FloatSource(checkpoint), checkpoint.spec, ids)
    kl = {}
    for extra in (0.0, 0.3):
        directory = tmp_path / str(extra)
        directory.mkdir()
        recipe = replace(NEAREST, extra_bytes=extra)
        graph, chosen = quantized_graph(open_checkpoint(path), recipe, calibration, directory, max_seq_len=64)
        assert bool(chosen.keep) == (extra > 0)
        kl[extra] = compare(reference, run_model(Artefact(graph), checkpoint.spec, ids), ids).mean_kl
    assert 0 < kl[0.3] < 0.8 * kl[0.0]


# ---- recipes and errors


def test_a_recipe_says_what_precision_a_module_has() -> None:
    recipe = Recipe(keep=("*.layers.2.*", "*.down_proj"))
    table = {
        "model.embed_tokens": "network", "lm_head": "network", "model.norm": "network",
        "model.layers.0.input_layernorm": "network", "model.layers.0.self_attn.q_norm": "network",
        "model.layers.0.self_attn.q_proj": "fp8", "model.layers.1.mlp.up_proj": "fp8",
        "model.layers.1.mlp.down_proj": "network", "model.layers.2.self_attn.o_proj": "network",
    }  # fmt: skip
    assert {module: recipe.precision_of(module) for module in table} == table
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe_named("default") == RECIPES["default"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "per_row"}, "weights is 'per_row'; one of per_channel, per_tensor"),
        ({"smoothing": 2.0}, "smoothing is 2.0"),
        ({"extra_bytes": -0.1}, "extra_bytes is -0.1"),
        ({"keep": ("",)}, "empty pattern"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_an_impossible_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        Recipe.from_dict(values)
    with pytest.raises(BuildError, match="one of default"):
        recipe_named("best")


def test_ranges_of_another_model_are_refused(llama: tuple[Path, Calibration], prepared: Any) -> None:
    with pytest.raises(CalibrationError, match="not of this model"):
        Quantizer(open_checkpoint(prepared("llama-head-dim")[0]), NEAREST, llama[1])


def test_a_weight_that_is_not_a_number_is_named(llama: tuple[Path, Calibration]) -> None:
    checkpoint = open_checkpoint(llama[0])
    read = checkpoint.read

    def damaged(name: str) -> Array:
        array = read(name).copy()
        if name == f"{DOWN_1}.weight":
            array[3, 3] = np.nan
        return array

    checkpoint.read = damaged  # type: ignore[method-assign]
    quantizer = Quantizer(checkpoint, NEAREST, llama[1])
    quantizer.quantized("model.layers.0.mlp.down_proj")
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has NaN"):
        quantizer.quantized(DOWN_1)


# ---- checkpoints that are FP8 already


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose layers take several blocks, the last ones cut short."""
    monkeypatch.setitem(OPTIONS, "llama-wide", ("llama", {"hidden_size": 160, "intermediate_size": 288}))


def block_scaled(directory: Path, change: Callable[[dict[str, Any]], None] = lambda tensors: None) -> Path:
    """The small llama, its linear layers as DeepSeek publishes them: E4M3 with a factor for each 128 × 128 block."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    path = make_checkpoint(directory, "llama-wide")
    file = path / "model.safetensors"
    tensors = safetensors.load_file(file)
    for name in [n for n in tensors if "_proj" in n]:
        rows, columns = tensors[name].shape
        blocks = torch.empty(-(-rows // 128), -(-columns // 128))
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        for i in range(blocks.shape[0]):
            for j in range(blocks.shape[1]):
                part = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                blocks[i, j] = tensors[name][part].abs().max() / 448
                codes[part] = (tensors[name][part] / blocks[i, j]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, blocks
    change(tensors)
    safetensors.save_file(tensors, file)
    return path


@pytest.mark.slow
def test_a_block_scaled_checkpoint_is_read_and_requantised(wide: None, tmp_path: Path) -> None:
    float_path = make_checkpoint(tmp_path / "float", "llama-wide")
    path = block_scaled(tmp_path / "fp8")
    source, exact = open_checkpoint(path), open_checkpoint(float_path)
    for name in exact.spec.tensor_shapes():
        error = np.linalg.norm(source.read(name) - exact.read(name)) / np.linalg.norm(exact.read(name))
        assert (0.005 < error < 0.04) if "_proj" in name else error == 0, name
    calibration = calibrate(open_checkpoint(path), windows())
    graph, _ = quantized_graph(open_checkpoint(path), Recipe(), calibration, tmp_path, max_seq_len=32)
    scale = Artefact(graph).quantized(DOWN_1)
    assert scale is not None and scale.scale.shape == (exact.spec.hidden_size,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{DOWN_1}.weight_scale_inv"), "weight_scale_inv is missing"),
        (
            lambda t: t.update({f"{DOWN_1}.weight_scale_inv": t[f"{DOWN_1}.weight_scale_inv"][:1, :1].clone()}),
            "has shape",
        ),
        (
            lambda t: t.update({"model.norm.weight_scale_inv": t["model.norm.weight"].clone()}),
            "belongs to no FP8 weight",
        ),
    ],
)
def test_block_scales_that_do_not_fit_are_named(change: Any, message: str, wide: None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(block_scaled(tmp_path / "fp8", change))
