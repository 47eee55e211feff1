"""FP8 without calibration: the arithmetic on all cores, the read-ahead, and a build that reads the file once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.digest import TensorDigest
from deepseek_triton.builders.checkpoint.read_ahead import TensorPrefetch
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import CalibrationError
from deepseek_triton.builders.fp8.quality.graph_weights import Artefact
from deepseek_triton.builders.fp8.quantize import quantized_graph, quantizing
from deepseek_triton.builders.fp8.recipe import RECIPES, Recipe
from deepseek_triton.builders.fp8.rounding import row_blocks
from deepseek_triton.builders.fp8.rounding.e4m3 import OCTAVE, least_weight_error_scale, max_scale, round_trip
from deepseek_triton.builders.fp8.rounding.host import encode_rows, row_amax, row_errors
from deepseek_triton.builders.fp8.texts import calibration_text
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.graph.float8 import E4M3
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.manifest import ArtefactFile, Manifest
from deepseek_triton.ensemble.artefacts.tensor_file import TensorFile
from tests.support.checkpoints import make_checkpoint, make_tokenizer

Array = np.ndarray[Any, Any]
FAST = RECIPES["fast"]
FLOAT16 = np.dtype(np.float16)


def nearest(values: Array, scale: Array) -> Array:
    """The codes by ml_dtypes' own conversion."""
    divided = values.astype(np.float32) / scale[:, None]
    codes: Array = np.clip(divided, -448, 448).astype(E4M3).view(np.uint8)
    return codes


def edges() -> Array:
    every = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    middles = (every[1:] + every[:-1]) / 2
    odd = np.array([0.0, -0.0, 1e-30, -1e-30, 1e-40, 463.9, 464, 465, -1e9, 3e38], np.float32)
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    values: Array = np.concatenate([every, middles, *near, odd]).astype(np.float32)
    return values


@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-14])
def test_codes_are_the_nearest_ones_at_every_edge(scale: float) -> None:
    values, scales = edges()[None] * np.float32(scale), np.array([scale], np.float32)
    np.testing.assert_array_equal(encode_rows(values, scales).view(np.uint8), nearest(values, scales))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (300, 50), (2, 5000)])
def test_every_dtype_and_shape_of_a_weight(dtype: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 1000)  # so that several threads have blocks
    weight = (np.random.default_rng(0).standard_normal(shape) * 0.03).astype(dtype)
    amax = np.abs(weight.astype(np.float32)).max(axis=1)
    np.testing.assert_array_equal(row_amax(weight), amax)
    scale = max_scale(amax, FLOAT16)
    np.testing.assert_array_equal(encode_rows(weight, scale).view(np.uint8), nearest(weight, scale))
    exact = weight.astype(np.float32)
    expected = [
        np.square(round_trip(exact, amax[:, None] / 448 * np.float32(f)) - exact).sum(axis=1, dtype=np.float64)
        for f in OCTAVE
    ]
    np.testing.assert_allclose(row_errors(weight, amax, OCTAVE), expected, rtol=1e-3, atol=1e-9)


def test_the_chosen_scales_err_less_than_the_largest_magnitudes() -> None:
    weight = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    amax = row_amax(weight)
    weight[0] = 0

    def error(scale: Array) -> Array:
        found: Array = np.square(round_trip(weight, scale[:, None] if scale.ndim else scale) - weight).sum(axis=1)
        return found

    by_max = error(max_scale(amax, FLOAT16))
    best = error(least_weight_error_scale(weight, FLOAT16))
    assert (best <= by_max * 1.001).all() and best.sum() < 0.98 * by_max.sum()
    whole = least_weight_error_scale(weight, FLOAT16, is_per_tensor=True)
    assert whole.shape == () and error(whole).sum() <= error(max_scale(amax.max(), FLOAT16)).sum()


def test_a_weight_that_is_not_finite_is_named() -> None:
    assert np.isnan(row_amax(np.array([[1, np.nan], [1, 2]], np.float32)))[0]
    assert np.isinf(row_amax(np.array([[1, -np.inf]], ml_dtypes.bfloat16)))[0]


# ---- reading


def test_tensors_read_ahead_come_in_order_and_few_are_in_memory() -> None:
    read: list[str] = []

    def slow(name: str) -> Array:
        read.append(name)
        return np.full(10, int(name), np.uint8)

    names = [str(i) for i in range(20)]
    with TensorPrefetch(slow, names, max_bytes=30) as ahead:
        for name in names[:5]:
            assert ahead.read(name)[0] == int(name)
        time.sleep(0.05)
        assert len(read) <= 5 + 4
        with pytest.raises(ValueError, match="9 asked for, 5 comes next"):
            ahead.read("9")
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


def test_what_reading_raises_reaches_the_reader() -> None:
    def broken(name: str) -> Array:
        if name == "1":
            raise BuildError("the disk is gone")
        return np.zeros(1)

    with TensorPrefetch(broken, ["0", "1", "2"]) as ahead:
        ahead.read("0")
        with pytest.raises(BuildError, match="the disk is gone"):
            ahead.read("1")
        with pytest.raises(ValueError, match="nothing more comes next"):
            ahead.read("2")


def test_a_digest_depends_on_names_values_and_order_alone() -> None:
    tensors = [(f"t{i}", np.full(1000 * (20 - i), i, np.float32)) for i in range(20)]

    def digest(tensors: list[tuple[str, Array]]) -> str:
        made = TensorDigest()
        for name, array in tensors:
            made.add(name, array)
        return made.hexdigest()

    first = digest(tensors)
    assert first == digest(tensors)
    other = tensors[0][1].copy()
    other[3] += 1
    assert len({first, digest(tensors[::-1]), digest([("t0", other), *tensors[1:]]), digest(tensors[:-1])}) == 4


# ---- builds


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fast") / "checkpoint"
    return make_tokenizer(make_checkpoint(directory, "qwen2", dtype="bfloat16", shard="60KB"))


@pytest.mark.slow
def test_a_build_reads_the_file_once_and_never_calibrates(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_text, "load_or_calibrate", None)
    for name, target, settings in (("a", "cuda", {}), ("b", "onnx", {"max_num_batched_tokens": 16})):
        options = BuildOptions(
            checkpoint, name, tmp_path / "models", target=target, precision="fp8", recipe="fast", max_seq_len=48,
            settings=settings,
        )  # fmt: skip
        build(options)
    cuda, onnx = (tmp_path / "models" / f"{name}-engine" / "1" for name in "ab")
    manifests = Manifest.load(cuda), Manifest.load(onnx)
    float_checkpoint = open_checkpoint(checkpoint)
    build_graph(float_checkpoint.spec, float_checkpoint.read, tmp_path, max_seq_len=48)
    assert {manifest.checkpoint_sha256 for manifest in manifests} == {float_checkpoint.digest()}
    assert manifests[0].files == {"model.safetensors": ArtefactFile.of(cuda / "model.safetensors")}
    assert [Recipe.from_dict(manifest.recipe) for manifest in manifests] == [FAST, FAST]
    # Both targets have the same codes and scales, whose errors are those of FP8.
    stored, graph = TensorFile(cuda / "model.safetensors"), Artefact(onnx / "model.onnx")
    for layer in range(3):
        linears = [graph.quantized(f"model.layers.{layer}.self_attn.{name}_proj") for name in "qkv"]
        found = [linear for linear in linears if linear is not None]
        assert len(found) == 3 and all(linear.input_scale is None for linear in found)
        codes = np.concatenate([np.ascontiguousarray(linear.weight).view(np.uint8) for linear in found])
        assert stored.read(f"layers.{layer}.qkv.weight").tobytes() == codes.tobytes()
        weight = float_checkpoint.read(f"model.layers.{layer}.self_attn.k_proj.weight").astype(np.float32)
        relative = np.linalg.norm(found[1].dequantized() - weight) / np.linalg.norm(weight)
        assert 0.01 < relative < 0.03


def test_kept_modules_stay_float(checkpoint: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    recipe = replace(FAST, keep=("*.1.mlp.*",), weights="per_tensor", scales="max")
    path, _ = quantized_graph(open_checkpoint(checkpoint), recipe, None, tmp_path, max_seq_len=48)
    artefact = Artefact(path)
    assert artefact.precision_of("model.layers.1.mlp.up_proj") == "FLOAT16"
    linear = artefact.quantized("model.layers.0.mlp.up_proj")
    assert linear is not None and linear.scale.shape == ()


def test_a_recipe_that_needs_a_calibration_says_so(checkpoint: Path) -> None:
    assert not FAST.needs_calibration
    assert all(recipe.needs_calibration for name, recipe in RECIPES.items() if name != "fast")
    with (
        pytest.raises(CalibrationError, match="needs a calibration"),
        quantizing(open_checkpoint(checkpoint), RECIPES["default"], None),
    ):
        pass


@pytest.mark.parametrize("option", ["calibration_text", "ranges"])
def test_options_of_the_calibration_are_refused_without_one(option: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="needs no calibration; leave out --"):
        BuildOptions(tmp_path, "x", target="cuda", precision="fp8", recipe="fast", **{option: tmp_path})  # type: ignore[arg-type]
