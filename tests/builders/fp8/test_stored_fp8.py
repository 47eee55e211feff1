"""Checkpoints that are FP8 already: the engine has their own codes and scales, and computes what torch computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from deepseek_triton.builders.checkpoint.quantized.scheme_keys import unknown_scheme_keys
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from deepseek_triton.builders.fp8.quality.graph_weights import Artefact
from deepseek_triton.builders.fp8.quantize import quantized_graph
from deepseek_triton.builders.fp8.stored import StoredLinears, stored_recipe
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensor_file import TensorFile
from tests.support.checkpoints import make_tokenizer
from tests.support.fp8_checkpoints import BLOCKS, KINDS, Kind, dequantized, reference_logits, write_fp8

Array = np.ndarray[Any, Any]
FLOAT32 = np.dtype(np.float32)
IDS = np.random.default_rng(3).integers(0, 319, 24)
STATIC, PER_TOKEN = "tensor, static", "channel, each token"


def run_graph(path: Path, ids: Array) -> Array:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids[None], "start": np.zeros(1, np.int64), "num_tokens": np.array([len(ids)])}
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            feeds[value.name] = np.zeros((1, *value.shape[1:]), np.float32)
    logits: Array = session.run(["logits"], feeds)[0][0]
    return logits


def torch_codes(path: Path) -> dict[str, bytes]:
    safetensors = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    tensors = safetensors.load_file(path / "model.safetensors")
    return {
        name: tensor.view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float8_e4m3fn
    }


@pytest.mark.parametrize("name", [*KINDS, *BLOCKS])
def test_other_precisions_dequantise_exactly(name: str, tmp_path: Path) -> None:
    kind = {**KINDS, **BLOCKS}[name]
    path = write_fp8(tmp_path / "c", kind)
    checkpoint, expected = open_checkpoint(path), dequantized(path, kind)
    assert set(expected) == set(checkpoint.spec.tensor_shapes())
    for tensor, values in expected.items():
        np.testing.assert_array_equal(np.asarray(checkpoint.read(tensor), np.float32), values.numpy(), err_msg=tensor)


@pytest.mark.parametrize("name", KINDS)
def test_an_fp8_graph_holds_the_checkpoint_s_codes_and_gives_torch_s_logits(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    path = write_fp8(tmp_path / "c", kind, "qwen2" if name == PER_TOKEN else "llama")
    checkpoint = open_checkpoint(path)
    recipe = stored_recipe(checkpoint)
    assert recipe is not None
    assert (recipe.weights, recipe.activations) == (
        "per_tensor" if kind.scales == "tensor" else "per_channel",
        "static" if kind.is_static else "dynamic",
    )
    graph, _ = quantized_graph(checkpoint, recipe, None, tmp_path, max_seq_len=32, network="fp32", logits="all")
    artefact, codes = Artefact(graph), torch_codes(path)
    assert len(codes) == 7 * checkpoint.spec.num_layers
    for tensor, expected in codes.items():
        linear = artefact.quantized(tensor.removesuffix(".weight"))
        assert linear is not None and np.ascontiguousarray(linear.weight).tobytes() == expected, tensor
    expected_logits = reference_logits(path, kind, IDS)
    # A last bit may round an activation to the neighbouring code: what differs then is little beside what FP8 does.
    error = np.linalg.norm(run_graph(graph, IDS) - expected_logits) / np.linalg.norm(expected_logits)
    assert error < 2e-3


def test_the_digest_is_that_of_a_float_build(tmp_path: Path) -> None:
    path = write_fp8(tmp_path / "c", KINDS[STATIC])
    checkpoint, other = open_checkpoint(path), open_checkpoint(path)
    recipe = stored_recipe(checkpoint)
    assert recipe is not None
    linears = StoredLinears(checkpoint, recipe, FLOAT32)
    for name in checkpoint.spec.tensor_shapes():
        np.testing.assert_array_equal(linears.read(name), other.read(name))
    assert checkpoint.digest() == other.digest()


def test_layers_that_read_one_value_share_the_largest_of_their_scales(tmp_path: Path) -> None:
    path = write_fp8(tmp_path / "c", KINDS[STATIC])
    change_tensors(path, lambda t: t["model.layers.0.self_attn.k_proj.input_scale"].fill_(0.04))
    checkpoint = open_checkpoint(path)
    recipe = stored_recipe(checkpoint)
    assert recipe is not None
    linears = StoredLinears(checkpoint, recipe, FLOAT32)
    scales = [linears.quantized(f"model.layers.0.self_attn.{name}_proj") for name in "qkvo"]
    found = [None if linear is None else linear.input_scale for linear in scales]
    assert found == pytest.approx([0.04, 0.04, 0.04, 0.006])


def change_tensors(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


DOWN = "model.layers.1.mlp.down_proj"


def test_layers_that_the_checkpoint_or_the_user_keeps_stay_float(tmp_path: Path) -> None:
    path = write_fp8(tmp_path / "c", KINDS[PER_TOKEN])
    kept = dequantized(path, KINDS[PER_TOKEN])

    def keep(tensors: dict[str, Any]) -> None:
        tensors[f"{DOWN}.weight"] = kept[f"{DOWN}.weight"].bfloat16()
        del tensors[f"{DOWN}.weight_scale"]

    change_tensors(path, keep)
    checkpoint = open_checkpoint(path)
    recipe = stored_recipe(checkpoint, ["*.up_proj"])
    assert recipe is not None and recipe.keep == ("*.up_proj", DOWN)
    artefact = Artefact(quantized_graph(checkpoint, recipe, None, tmp_path, max_seq_len=32)[0])
    up = "model.layers.1.mlp.up_proj"
    assert [artefact.precision_of(name) for name in (DOWN, up)] == ["FLOAT16", "FLOAT16"]
    assert artefact.precision_of("model.layers.0.mlp.down_proj") == "FLOAT8E4M3FN"
    np.testing.assert_allclose(artefact.read(f"{up}.weight"), kept[f"{up}.weight"].numpy(), atol=1e-3)


def built(checkpoint: Path, directory: Path, target: str, **options: Any) -> Path:
    make_tokenizer(checkpoint)
    build(BuildOptions(checkpoint, "m", directory / "repository", target, precision="fp8", max_seq_len=32, **options))
    return directory / "repository" / "m-engine" / "1"


@pytest.mark.slow
@pytest.mark.parametrize("name", [PER_TOKEN, STATIC])
def test_target_onnx_is_built_without_calibration(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_triton.builders.fp8.texts.calibration_text.calibrate", None)
    path = write_fp8(tmp_path / "c", KINDS[name])
    engine = built(path, tmp_path, "onnx")
    recipe = Manifest.load(engine).recipe
    assert (recipe["rounding"], recipe["activations"]) == ("stored", "static" if name == STATIC else "dynamic")
    artefact = Artefact(engine / "model.onnx")
    for tensor, codes in torch_codes(path).items():
        linear = artefact.quantized(tensor.removesuffix(".weight"))
        assert linear is not None and np.ascontiguousarray(linear.weight).tobytes() == codes


@pytest.mark.slow
@pytest.mark.parametrize("name", [PER_TOKEN, STATIC])
def test_target_cuda_has_the_codes_and_the_scales_row_by_row(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    path = write_fp8(tmp_path / "c", kind)
    engine = built(path, tmp_path, "cuda")
    assert Manifest.load(engine).recipe["activations"] == "dynamic", "its kernels scale each token"
    file, codes = TensorFile(engine / "model.safetensors"), torch_codes(path)
    expected = dequantized(path, kind)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for matrix, modules in {"qkv": ["self_attn.q", "self_attn.k", "self_attn.v"], "down": ["mlp.down"]}.items():
            names = [f"{prefix}{module}_proj.weight" for module in modules]
            stored = file.read(f"layers.{layer}.{matrix}.weight")
            assert stored.tobytes() == b"".join(codes[tensor] for tensor in names)
            scale = file.read(f"layers.{layer}.{matrix}.scale").view(np.float32)
            import ml_dtypes

            values = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(len(scale), -1) * scale[:, None]
            np.testing.assert_array_equal(values, np.concatenate([expected[tensor].numpy() for tensor in names]))


def test_blocks_are_quantised_anew(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_fp8(tmp_path / "c", BLOCKS["DeepSeek"]))
    assert checkpoint.fp8 is None and stored_recipe(checkpoint) is None


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"recipe": "static"}, {"ranges": Path("ranges.json")}])
def test_options_of_a_quantisation_that_does_not_happen_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    path = write_fp8(tmp_path / "c", KINDS[PER_TOKEN])
    with pytest.raises(BuildError, match=f"{next(iter(option))} is for a checkpoint that this build quantises"):
        built(path, tmp_path, "onnx", **option)


# What doesn't fit is named.

DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "no scale": (PER_TOKEN, lambda t: t.pop(f"{DOWN}.weight_scale"), r"weight_scale_inv is missing"),
    "scale of nothing": (
        PER_TOKEN,
        lambda t: t.update({"model.norm.weight_scale": t["model.norm.weight"].clone()}),
        "'model.norm.weight_scale' belongs to no FP8 weight",
    ),
    "fewer rows": (PER_TOKEN, lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"][:3]}), "has shape"),
    "two scales": (
        PER_TOKEN,
        lambda t: t.update({f"{DOWN}.weight_scale_inv": t[f"{DOWN}.weight_scale"].clone()}),
        "has two scales",
    ),
    "no input scale": (
        STATIC,
        lambda t: t.pop(f"{DOWN}.input_scale"),
        "and .*down_proj.input_scale is missing",
    ),
    "a negative scale": (PER_TOKEN, lambda t: t[f"{DOWN}.weight_scale"].mul_(-1), "no finite positive numbers"),
    "a scale that is no number": (
        STATIC,
        lambda t: t[f"{DOWN}.weight_scale"].fill_(float("nan")),
        "no finite positive",
    ),
    "a scale of another kind of weight": (
        PER_TOKEN,
        lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].bfloat16()}),
        "belongs to no FP8 weight: its weight is BF16, not F8_E4M3",
    ),
    "an input scale of 0": (STATIC, lambda t: t[f"{DOWN}.input_scale"].zero_(), "input_scale is 0"),
    "a code that is no number": (PER_TOKEN, lambda t: t[f"{DOWN}.weight"].fill_(float("nan")), "stand for no number"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_scales_that_do_not_fit_are_named(damage: str, tmp_path: Path) -> None:
    name, change, message = DAMAGES[damage]
    path = write_fp8(tmp_path / "c", KINDS[name])
    change_tensors(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint = open_checkpoint(path)
        recipe = stored_recipe(checkpoint)
        assert recipe is not None
        quantized_graph(checkpoint, recipe, None, tmp_path, max_seq_len=32)
    assert "fetch" not in str(caught.value)


def test_a_zero_point_must_be_zero(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = write_fp8(tmp_path / "c", KINDS[PER_TOKEN])
    zero = torch.zeros(64, 1, dtype=torch.int8)
    change_tensors(path, lambda t: t.update({f"{DOWN}.weight_zero_point": zero}))
    open_checkpoint(path).read(f"{DOWN}.weight")
    # Earlier releases of compressed-tensors store it in the type of the codes.
    change_tensors(path, lambda t: t.update({f"{DOWN}.weight_zero_point": zero.to(torch.float8_e4m3fn)}))
    open_checkpoint(path).read(f"{DOWN}.weight")
    change_tensors(path, lambda t: t.update({f"{DOWN}.weight_zero_point": zero + 1}))
    with pytest.raises(UnsupportedError, match="weight_zero_point isn't zero: asymmetric"):
        open_checkpoint(path).read(f"{DOWN}.weight")


def kind_with(**changes: Any) -> Kind:
    kind = KINDS[PER_TOKEN]
    group = {**kind.config["config_groups"]["group_0"], **changes.pop("group", {})}
    config = {**kind.config, "config_groups": {"group_0": group}, **changes}
    return Kind(config, kind.scales)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (kind_with(format="pack-quantized"), "compressed-tensors' pack-quantized are not supported; give the"),
        (kind_with(format="nvfp4-pack-quantized"), "compressed-tensors' nvfp4-pack-quantized"),
        (kind_with(group={"format": "int-quantized"}), "compressed-tensors' int-quantized"),
        (kind_with(config_groups={"FP8_DYNAMIC": ["Linear"]}), "names the preset 'FP8_DYNAMIC': write"),
        (kind_with(sparsity_config={"format": "sparse-24-bitmask"}), "compressed-tensors' sparse-24-bitmask"),
        (kind_with(transform_config={"config_groups": {"R1": {}}}), "rotated weights are not supported"),
        (kind_with(group={"weights": {"num_bits": 4, "type": "int"}}), "with 4-bit int weights"),
        (kind_with(group={"input_activations": {"num_bits": 8, "type": "int"}}), "with 8-bit int input_activations"),
        (kind_with(group={"output_activations": {"num_bits": 8, "type": "float"}}), "quantised outputs"),
        (kind_with(group={"weights": {"num_bits": 8, "type": "float", "symmetric": False}}), "asymmetric weights"),
        (Kind({"quant_method": "fp8", "activation_scheme": "odd"}, "tensor"), "activation_scheme 'odd'"),
        (Kind({"quant_method": "fp8", "fmt": "e5m2"}, "tensor"), "fmt 'e5m2': only e4m3"),
        (Kind({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "tensor"), "ModelOpt's NVFP4"),
        (Kind({"quant_method": "fbgemm_fp8"}, "tensor"), "FBGEMM FP8"),
    ],
)
def test_other_schemes_are_refused_by_name(kind: Kind, message: str, tmp_path: Path) -> None:
    path = write_fp8(tmp_path / "c", KINDS[PER_TOKEN])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": kind.config}))
    with pytest.raises(UnsupportedError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path / 'config.json'}: ")


@pytest.mark.parametrize("name", [*KINDS, *BLOCKS])
def test_keys_of_the_scheme_in_no_table_are_named(name: str) -> None:
    config = copy.deepcopy(({**KINDS, **BLOCKS})[name].config)
    assert unknown_scheme_keys({"quantization_config": config}) == ()
    config["rotation"] = True
    expected = ["quantization_config.rotation"]
    if groups := config.get("config_groups"):
        groups["group_0"]["weights"]["hadamard"] = True
        expected.append("quantization_config.config_groups.group_0.weights.hadamard")
    (note,) = unknown_scheme_keys({"quantization_config": config})
    assert note.startswith("warning: config.json has keys") and note.endswith(f": {', '.join(expected)}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [PER_TOKEN, STATIC])
def test_rotary_channels_that_lie_in_pairs_are_reordered_in_codes_and_scales(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    kind = KINDS[name]
    path = write_fp8(tmp_path / "fp8", kind, "v2-lite")
    expected = dequantized(path, kind)
    float_path = tmp_path / "float"
    float_path.mkdir()
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (float_path / "config.json").write_text(json.dumps(config))
    safetensors.save_file(expected, float_path / "model.safetensors")
    checkpoint, exact = open_checkpoint(path), open_checkpoint(float_path)
    assert checkpoint.fp8 is not None
    for tensor in checkpoint.spec.tensor_shapes():
        np.testing.assert_array_equal(np.asarray(checkpoint.read(tensor), np.float32), exact.read(tensor))
    for module in checkpoint.fp8.modules:
        np.testing.assert_array_equal(checkpoint.fp8.read(module).dequantized(), exact.read(f"{module}.weight"))
