"""The cuda target without a GPU: the file, its layout, and what the builder puts into it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.calibrate import calibrate
from deepseek_triton.builders.fp8.quantizer import Quantizer
from deepseek_triton.builders.fp8.recipe import RECIPES, Recipe
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets import target_named
from deepseek_triton.builders.targets.artefacts.cuda_weights import check_recipe, write_weights
from deepseek_triton.builders.targets.artefacts.decoder_shape import decoder_shape
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape, LayoutError
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry, TensorFile, TensorFileError, write_tensors
from deepseek_triton.ensemble.decoder.options import ExpertOptions, LatentOptions
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from tests.support.checkpoints import make_checkpoint, make_tokenizer

Array = NDArray[np.float32]
ENTRIES = {"a": TensorEntry("F32", (2, 3)), "b": TensorEntry("BF16", (4,)), "c": TensorEntry("F8_E4M3", (0,))}
ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(4, ml_dtypes.bfloat16),
    "c": np.zeros(0, ml_dtypes.float8_e4m3fn),
}


def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", ENTRIES, ARRAYS.items())
    file = TensorFile(tmp_path / "x")
    assert file.entries == ENTRIES
    for name, array in ARRAYS.items():
        assert file.read(name).tobytes() == array.tobytes()
    safetensors = pytest.importorskip("safetensors.torch")
    loaded = safetensors.load_file(tmp_path / "x")
    np.testing.assert_array_equal(loaded["a"].numpy(), ARRAYS["a"])
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {n: e.shape for n, e in ENTRIES.items()}


@pytest.mark.parametrize("order", [["a"], ["b", "a", "c"], ["a", "b", "c", "a"]])
def test_tensors_out_of_order_are_refused(order: list[str], tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match=r"expected|was not given"):
        write_tensors(tmp_path / "x", ENTRIES, [(name, ARRAYS[name]) for name in order])


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: b.replace(b"BF16", b"XF16")]
)
def test_a_damaged_file_is_told(damage: object, tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", ENTRIES, ARRAYS.items())
    (tmp_path / "x").write_bytes(damage((tmp_path / "x").read_bytes()))  # type: ignore[operator]
    with pytest.raises(TensorFileError, match=r"cut short|doesn't lie|must be one of"):
        TensorFile(tmp_path / "x")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="build the model again"):
        TensorFile(tmp_path / "nothing")


SHAPE = DecoderShape(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    rms_norm_eps=1e-5, max_seq_len=8,
)  # fmt: skip


LATENT = LatentOptions(
    q_lora_rank=8, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, softmax_factor=1.2
)
EXPERTS = ExpertOptions(8, 2, 16, 1, 1, "sigmoid", "group_top2", num_groups=2, topk_group=1, is_normalised=True)


@pytest.mark.parametrize("options", [{}, {"latent": LATENT}, {"latent": LATENT, "experts": EXPERTS}])
def test_a_shape_survives_the_manifest(options: dict[str, Any]) -> None:
    shape = replace(SHAPE, **options)
    assert DecoderShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


def test_a_dense_decoders_manifest_is_the_older_ones_and_an_odd_one_is_refused() -> None:
    assert SHAPE.to_dict().keys() == {field.name for field in fields(SHAPE)} - {"latent", "experts", "expert_share"}
    with pytest.raises(LayoutError, match=r"routers.*build the model again"):
        DecoderShape.from_dict({**SHAPE.to_dict(), "experts": {"routers": 3}})
    with pytest.raises(LayoutError, match="odd"):
        DecoderShape.from_dict({**SHAPE.to_dict(), "odd": 1})
    with pytest.raises(LayoutError, match="head_dim"):
        DecoderShape.from_dict({name: value for name, value in SHAPE.to_dict().items() if name != "head_dim"})


@pytest.mark.parametrize(("field", "value"), [("num_heads", 3), ("hidden_size", 0), ("max_seq_len", 1)])
def test_an_impossible_shape_is_refused(field: str, value: int) -> None:
    with pytest.raises(LayoutError, match=field):
        replace(SHAPE, **{field: value})  # type: ignore[arg-type]


def test_layers_have_parts_of_their_own() -> None:
    shape = replace(SHAPE, latent=LATENT, experts=EXPERTS)
    assert [part.NOUN for part in shape.parts(0)] == ["latent attention", "dense MLP"]
    assert [part.NOUN for part in shape.parts(1)] == ["latent attention", "mixture of experts"]
    assert list(shape.matrices(0)) == ["q_kv_a", "q_b", "kv_b", "o", "gate_up", "down"]
    assert shape.matrices(0)["q_kv_a"] == (8 + 16 + 4, 16) and shape.matrices(0)["kv_b"] == (4 * (6 + 5), 16)
    assert shape.cache_bytes(3) == 2 * 3 * 8 * (16 + 4) * 2, "one entry a token, not keys and values"
    entries = replace(SHAPE, latent=LATENT).entries(frozenset(), frozenset())
    assert entries["layers.0.kv_a_norm"].shape == (16,) and entries["layers.1.q_a_norm"].shape == (8,)
    assert entries["rope.cos"].shape == (8, 2)
    with pytest.raises(LayoutError, match="tensor_parallel_size is 3: 4 heads can't be shared out evenly; this model"):
        ShardedDecoder(shape, 0, 3)


def test_missing_and_wrong_tensors_are_named() -> None:
    entries = SHAPE.entries(frozenset({"layers.0.o"}), frozenset({"layers.1.qkv"}))
    SHAPE.check(entries)
    with pytest.raises(LayoutError, match=r"layers\.1\.down\.weight is missing"):
        SHAPE.check({name: entry for name, entry in entries.items() if name != "layers.1.down.weight"})
    with pytest.raises(LayoutError, match=r"layers\.0\.o\.weight"):
        SHAPE.check({name: entry for name, entry in entries.items() if name != "layers.0.o.scale"})
    with pytest.raises(LayoutError, match="surplus"):
        SHAPE.check(entries | {"surplus": TensorEntry("F32", (1,))})


def bfloat16(
    array: Array,
) -> Array:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def read(file: TensorFile, name: str) -> Array:
    dtypes = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    entry = file.entries[name]
    found: Array = file.read(name).view(dtypes[entry.dtype]).reshape(entry.shape).astype(np.float32)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("option", ["qwen2", "qwen3", "llama-biases", "llama-mha-tied"])
def test_bfloat16_weights_are_the_checkpoints(option: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint", option)
    checkpoint, again = open_checkpoint(path), open_checkpoint(path)
    spec = checkpoint.spec
    written = write_weights(spec, checkpoint.read, tmp_path, max_seq_len=40)
    file, entries = written.path, written.entries
    assert written.sha256 == sha256(file.read_bytes()).hexdigest()
    decoder_shape(spec, 40).check(entries)
    stored = TensorFile(file)
    prefix = "model.layers.1."
    heads = [again.read(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]
    np.testing.assert_array_equal(read(stored, "layers.1.qkv.weight"), bfloat16(np.concatenate(heads)))
    both = [again.read(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up")]
    np.testing.assert_array_equal(read(stored, "layers.1.gate_up.weight"), bfloat16(np.concatenate(both)))
    np.testing.assert_array_equal(
        read(stored, "layers.1.mlp_norm"), bfloat16(again.read(f"{prefix}post_attention_layernorm.weight"))
    )
    assert ("layers.1.qkv.bias" in entries) == spec.qkv_bias
    assert ("layers.1.down.bias" in entries) == spec.mlp_bias
    assert ("head" in entries) != spec.tie_word_embeddings
    if spec.qkv_bias:
        biases = [again.read(f"{prefix}self_attn.{name}_proj.bias") for name in "qkv"]
        np.testing.assert_array_equal(read(stored, "layers.1.qkv.bias"), np.concatenate(biases))
    if spec.qk_norm:
        np.testing.assert_array_equal(
            read(stored, "layers.1.k_norm"), bfloat16(again.read(f"{prefix}self_attn.k_norm.weight"))
        )


def test_fp8_weights_are_the_quantisers_and_kept_layers_are_bfloat16(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    random = np.random.default_rng(0)
    calibration = calibrate(open_checkpoint(path), [random.integers(0, 320, 64) for _ in range(4)])
    # One of the three that read one input is kept: so are all.
    recipe = Recipe(rounding="nearest", scales="max", bias_correction=True, keep=("*.1.self_attn.k_proj",))
    checkpoint = open_checkpoint(path)
    quantizer, expected = (Quantizer(c, recipe, calibration) for c in (checkpoint, open_checkpoint(path)))
    written = write_weights(
        checkpoint.spec, quantizer.read, tmp_path, max_seq_len=40, recipe=recipe, quantized=quantizer.quantized
    )
    file, entries = written.path, written.entries
    decoder_shape(checkpoint.spec, 40).check(entries)
    stored = TensorFile(file)
    assert entries["layers.0.qkv.weight"].dtype == "F8_E4M3"
    assert entries["layers.1.qkv.weight"].dtype == "BF16"
    assert "layers.1.qkv.scale" not in entries
    for group, modules in {"qkv": "qkv", "gate_up": ("gate", "up")}.items():
        kind = "self_attn" if group == "qkv" else "mlp"
        linears = [expected.quantized(f"model.layers.0.{kind}.{name}_proj") for name in modules]
        assert all(linear is not None for linear in linears)
        weight = np.concatenate([linear.dequantized() for linear in linears if linear is not None])
        found = read(stored, f"layers.0.{group}.weight") * read(stored, f"layers.0.{group}.scale")[:, None]
        np.testing.assert_array_equal(found, weight)
        biases = [linear.bias for linear in linears if linear is not None and linear.bias is not None]
        np.testing.assert_array_equal(read(stored, f"layers.0.{group}.bias"), np.concatenate(biases))


def test_static_activation_scales_are_refused() -> None:
    with pytest.raises(BuildError, match=r"activations are 'static'; target cuda"):
        check_recipe(RECIPES["static"])


@pytest.mark.parametrize(("target", "precision"), [("cuda", "fp16"), ("cuda", "fp32"), ("onnx", "bf16")])
def test_a_precision_that_a_target_lacks_is_refused(target: str, precision: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"precision is '{precision}'; target {target} has"):
        BuildOptions(tmp_path, "x", target=target, precision=precision)


@pytest.mark.slow
def test_a_repository_for_the_cuda_target_is_whole_and_its_digest_is_that_of_the_others(tmp_path: Path) -> None:
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "qwen2"))
    digests = set()
    for name, target, precision in (("a", "cuda", "bf16"), ("b", "onnx", "fp32")):
        options = BuildOptions(
            checkpoint, name, tmp_path / "models", target=target, precision=precision, max_seq_len=48,
            settings={} if target == "cuda" else {"max_num_batched_tokens": 16},
        )  # fmt: skip
        build(options)
        manifest = Manifest.load(tmp_path / "models" / f"{name}-engine" / "1")
        digests.add(manifest.checkpoint_sha256)
        manifest.verify(tmp_path / "models" / f"{name}-engine" / "1")
    assert len(digests) == 1
    engine = Manifest.load(tmp_path / "models" / "a-engine" / "1")
    assert DecoderShape.from_dict(engine.engine) == decoder_shape(open_checkpoint(checkpoint).spec, 48)
    assert check_repository(tmp_path / "models") == []
    config = tmp_path / "models" / "a-engine" / "config.pbtxt"
    text = config.read_text()
    assert text.count('"tensor_parallel_size"') == 1
    head, _, tail = text.partition('"tensor_parallel_size"')
    config.write_text(head + '"tensor_parallel_size"' + tail.replace('"1"', '"5"', 1))
    (problem,) = check_repository(tmp_path / "models")
    assert "parameters: tensor_parallel_size is 5: 4 query heads can't be shared out evenly" in str(problem)
    assert list(engine.files) == ["model.safetensors"]


def test_a_cuda_engine_has_a_gpus_defaults_and_what_is_asked_for_wins(tmp_path: Path) -> None:
    spec = open_checkpoint(make_checkpoint(tmp_path / "checkpoint", "qwen2")).spec

    def settings(target: str, max_seq_len: int, changed: ModelSpec = spec, **asked: object) -> EngineSettings:
        options = BuildOptions(
            tmp_path, "x", target=target, precision=target_named(target).precisions[0], settings=asked
        )
        return target_named(target).settings(options, changed, max_seq_len)

    assert settings("onnx", 4096) == EngineSettings()
    assert settings("onnx", 40).max_num_batched_tokens == 40, "a default is never more than the model can have"
    gpu = settings("cuda", 4096)
    assert (gpu.max_num_seqs, gpu.max_num_batched_tokens, gpu.max_prefill_stall) == (64, 8192, 10.0)
    assert settings("cuda", 48).max_num_batched_tokens == 8192, "of several prompts"
    # 28 layers of 4 key heads of 128, as R1-Distill-Qwen-7B: 57,344 bytes a token.
    large = replace(spec, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, intermediate_size=18944)
    assert settings("cuda", 4096, large).max_num_seqs == 64
    assert settings("cuda", 131072, large).kv_cache == "pages" and settings("cuda", 131072, large).max_num_seqs == 64
    assert settings("cuda", 131072, large, kv_cache="slots").max_num_seqs == 4, "32 GiB of caches"
    asked = settings(
        "cuda", 4096, max_num_seqs=3, max_num_batched_tokens=64, max_prefill_stall=1.5, batch_invariant=True
    )
    assert asked == EngineSettings(max_num_seqs=3, batch_invariant=True, kv_cache="pages")
    assert settings("cuda", 64, max_num_batched_tokens=65).max_num_batched_tokens == 65
    with pytest.raises(BuildError, match="max_num_batched_tokens is 65, must be at most max_seq_len 64"):
        settings("onnx", 64, max_num_batched_tokens=65)
    four = settings("cuda", 131072, large, tensor_parallel_size=4, kv_cache="slots")
    assert four.max_num_seqs == 18, "32 GiB of each of four GPUs"
    with pytest.raises(BuildError, match="tensor_parallel_size is 3: 28 query heads can't be shared out evenly"):
        settings("cuda", 4096, large, tensor_parallel_size=3)


@pytest.mark.parametrize("target", ["onnx", "tensorrt", "tensorrt-rtx"])
def test_a_setting_that_a_target_lacks_is_refused(target: str, tmp_path: Path) -> None:
    for setting, text in ({"batch_invariant": True}, "true"), ({"tensor_parallel_size": 2}, "2"):
        (name,) = setting
        with pytest.raises(BuildError, match=f"{name} is {text}, which target {target} doesn't have.*target cuda"):
            BuildOptions(tmp_path, "x", target=target, precision="fp16", settings=setting)
