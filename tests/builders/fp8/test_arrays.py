"""Compensation and the layers' forward pass are one code in NumPy and torch: the same numbers, within tolerances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.fp8.calibrate import calibrate
from deepseek_triton.builders.fp8.forward import layer as layers
from deepseek_triton.builders.fp8.forward.generate import ArrayDecoder, can_generate
from deepseek_triton.builders.fp8.forward.layer import layer_runner
from deepseek_triton.builders.fp8.forward.layer_session import layer_session
from deepseek_triton.builders.fp8.quantizer import Quantizer
from deepseek_triton.builders.fp8.recipe import RECIPES
from deepseek_triton.builders.fp8.rounding.arrays import Arrays, TorchArrays, best_arrays
from deepseek_triton.builders.fp8.rounding.compensate import SecondMoment, compensated_codes
from deepseek_triton.builders.fp8.rounding.e4m3 import encode, least_error_scale, least_weight_error_scale, max_scale
from deepseek_triton.builders.fp8.texts import generated_text
from deepseek_triton.builders.graph.float8 import E4M3
from deepseek_triton.ensemble.decoder.spec import layer_prefix
from tests.support.checkpoints import OPTIONS, make_checkpoint

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def torch_arrays() -> Arrays:
    pytest.importorskip("torch")
    return TorchArrays("cpu")


@pytest.fixture(params=["numpy", "torch"])
def arrays(request: pytest.FixtureRequest, torch_arrays: Arrays) -> Arrays:
    return Arrays() if request.param == "numpy" else torch_arrays


def test_rounding_is_that_of_the_codes(arrays: Arrays) -> None:
    values = np.concatenate([np.arange(-4000, 4001) / 8, np.arange(-4000, 4001) / 8192, [1e-30, -1e9]])
    values = values.astype(np.float32)[None]
    rounded = arrays.rounded(arrays.put(values))
    expected = encode(values, 1.0)
    np.testing.assert_array_equal(arrays.get(rounded), expected.astype(np.float32))
    np.testing.assert_array_equal(arrays.codes(rounded) & 0x7F, expected.view(np.uint8) & 0x7F)
    scale = np.array([0.25], np.float32)
    np.testing.assert_array_equal(arrays.get(arrays.decoded(expected, scale)), expected.astype(np.float32) / 4)


def test_a_weight_arrives_as_float32_whatever_its_dtype(arrays: Arrays) -> None:
    import ml_dtypes

    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        weight = np.random.default_rng(0).standard_normal((3, 5)).astype(dtype)
        np.testing.assert_array_equal(arrays.get(arrays.put(weight)), weight.astype(np.float32))


def test_weights_are_searched_and_rounded_alike_everywhere(arrays: Arrays) -> None:
    import ml_dtypes

    weight = (np.random.default_rng(0).standard_normal((40, 300)) * 0.02).astype(ml_dtypes.bfloat16)
    placed = arrays.place(weight)
    amax = arrays.row_amax(placed)
    np.testing.assert_array_equal(amax, np.abs(weight.astype(np.float32)).max(axis=1))
    for importance in (None, np.random.default_rng(1).random(300)):
        found = arrays.row_errors(placed, amax, (0.84, 1.0, 1.3), importance)
        np.testing.assert_allclose(found, Arrays().row_errors(weight, amax, (0.84, 1.0, 1.3), importance), rtol=1e-3)
    scale = least_weight_error_scale(placed, np.dtype(np.float16), arrays=arrays)
    codes = arrays.encode_rows(placed, scale)
    np.testing.assert_array_equal(codes.view(np.uint8), encode(weight, scale[:, None]).view(np.uint8))


def correlated() -> tuple[Array, Array]:
    """A layer's inputs [400, 300] and its weight [80, 300]."""
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 30)).astype(np.float32) @ random.standard_normal((30, 300)).astype(np.float32)
    x += 0.2 * random.standard_normal(x.shape).astype(np.float32)
    return x, random.standard_normal((80, 300)).astype(np.float32)


def test_compensation_in_torch_errs_as_little_as_in_numpy(torch_arrays: Arrays) -> None:
    x, weight = correlated()
    found = []
    for arrays in (Arrays(), torch_arrays):
        moment = SecondMoment(300, arrays)
        for part in np.array_split(x, 3):
            moment.add(arrays.put(part))
        scale = least_error_scale(weight, moment.diagonal(), np.dtype(np.float32), arrays=arrays)
        found.append((scale, compensated_codes(weight, scale, moment)))
    (scale, codes), (torch_scale, torch_codes) = found
    np.testing.assert_allclose(torch_scale, scale, rtol=1e-5)
    # Where a number lies between two codes, the last bits of a sum decide: later channels follow that choice.
    assert (codes.view(np.uint8) != torch_codes.view(np.uint8)).mean() < 0.03
    errors = [np.linalg.norm((weight - c.astype(np.float32) * scale[:, None]) @ x.T) for c in (codes, torch_codes)]
    nearest = encode(weight, scale[:, None]).astype(np.float32) * scale[:, None]
    assert abs(errors[1] / errors[0] - 1) < 0.02 and errors[0] < 0.5 * np.linalg.norm((weight - nearest) @ x.T)


def test_blocks_of_any_size_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated()
    moment = SecondMoment(300)
    moment.add(x)
    scale = max_scale(np.abs(weight).max(axis=1), np.dtype(np.float32))
    module = "deepseek_triton.builders.fp8.rounding.compensate"
    found = []
    for lazy, inner, updated, inverted in ((128, 16, 1024, 256), (300, 300, 300, 300), (7, 3, 20, 10)):
        for name, value in zip(
            ("LAZY_BLOCK", "INNER_BLOCK", "UPDATED", "INVERTED"), (lazy, inner, updated, inverted), strict=True
        ):
            monkeypatch.setattr(f"{module}.{name}", value)
        found.append(compensated_codes(weight, scale, moment).view(np.uint8))
    for codes in found[1:]:
        assert (codes != found[0]).mean() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("option", ["llama-biases", "llama-head-dim", "llama-yarn", "qwen2", "qwen3", "llama-mha-tied"])
def test_a_layer_computes_what_its_graph_computes(option: str, arrays: Arrays, tmp_path: Path) -> None:
    assert option in OPTIONS
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "checkpoint", option))
    spec, read = checkpoint.spec, checkpoint.read
    hidden = np.random.default_rng(0).standard_normal((40, spec.hidden_size)).astype(np.float32)
    taps = tuple(tap.value for tap in spec.taps(1))
    with layer_session(spec, 1, read, max_seq_len=48, outputs=taps) as session:
        expected = session.run(hidden, taps)
    with layer_runner(spec, 1, read, arrays, max_seq_len=48, outputs=taps) as runner:
        found = runner.run(arrays.put(hidden), taps)
    for value, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(arrays.get(value), reference, rtol=2e-4, atol=2e-4)


def test_a_layer_with_an_unknown_part_runs_in_onnx_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_arrays: Arrays
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "checkpoint"))
    hidden = torch_arrays.put(np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32))
    results = []
    for parts in (layers.PARTS, {}):
        monkeypatch.setattr(layers, "PARTS", parts)
        with layer_runner(checkpoint.spec, 0, checkpoint.read, torch_arrays, max_seq_len=20) as runner:
            results.append(torch_arrays.get(runner.run(hidden)[0]))
    np.testing.assert_allclose(results[1], results[0], rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_a_whole_quantisation_in_torch_is_numpys(tmp_path: Path, torch_arrays: Arrays) -> None:
    path = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    windows = list(np.random.default_rng(0).integers(0, 319, (4, 64)))
    found = []
    for arrays in (Arrays(), torch_arrays):
        calibration = calibrate(open_checkpoint(path), windows, arrays=arrays)
        quantizer = Quantizer(open_checkpoint(path), RECIPES["default"], calibration, arrays=arrays)
        modules = [layer_prefix(layer) + module for layer in range(3) for module in ("self_attn.o_proj", "mlp.up_proj")]
        found.append((calibration, [quantizer.quantized(module) for module in modules]))
    (calibration, linears), (torch_calibration, torch_linears) = found
    for name, statistics in calibration.taps.items():
        other = torch_calibration.taps[name]
        np.testing.assert_allclose(other.channel_amax, statistics.channel_amax, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(other.mean_square, statistics.mean_square, rtol=1e-3, atol=1e-6)
    for linear, torch_linear in zip(linears, torch_linears, strict=True):
        assert linear is not None and torch_linear is not None
        assert linear.bias is not None and torch_linear.bias is not None
        # Of two scales that round a row nearly as well, sums in another order may choose the other.
        assert np.isclose(torch_linear.scale, linear.scale, rtol=0.1).mean() > 0.95
        np.testing.assert_allclose(torch_linear.scale, linear.scale, rtol=0.5)
        relative = np.linalg.norm(torch_linear.dequantized() - linear.dequantized()) / np.linalg.norm(
            linear.dequantized()
        )
        assert relative < 0.02  # E4M3's own rounding is some 0.026
        assert (np.asarray(torch_linear.weight, E4M3).view(np.uint8) == linear.weight.view(np.uint8)).mean() > 0.8


@pytest.mark.parametrize(("option", "changes"), [("qwen2", {}), ("llama-mha-tied", {}), ("v32", {"index_topk": 6})])
def test_a_decoder_in_arrays_writes_what_its_graph_writes(
    option: str, changes: dict[str, Any], arrays: Arrays, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path / "checkpoint", option, **changes)
    tokens = np.random.default_rng(0).integers(0, 319, (3, 8))

    def likeliest(logits: Array) -> Array:
        best: Array = logits.argmax(axis=1)[:, None].astype(np.int64)
        return best

    expected = generated_text._in_onnx_runtime(open_checkpoint(path), tokens, 6, likeliest)
    checkpoint = open_checkpoint(path)
    decoder = ArrayDecoder(checkpoint.spec, checkpoint.read, arrays, 14)
    for _ in range(2):  # the caches begin empty
        np.testing.assert_array_equal(decoder.generate(tokens, 6, likeliest), expected)


def test_generation_needs_room_and_known_parts(arrays: Arrays, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = open_checkpoint(make_checkpoint(tmp_path / "checkpoint")).spec
    assert can_generate(spec, arrays)
    monkeypatch.setattr(type(arrays), "free_bytes", lambda self: spec.num_parameters() * 4)
    assert not can_generate(spec, arrays)


def test_without_a_gpu_the_processor_does_the_work() -> None:
    best_arrays.cache_clear()
    torch = pytest.importorskip("torch")
    assert (best_arrays().name == "cuda") == torch.cuda.is_available()
    best_arrays.cache_clear()
