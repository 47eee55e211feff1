"""What lies in a directory of weights: other names, tensors that take no part, other formats, and what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.files.hub_cache import model_name
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from tests.support.checkpoints import TINY, Tensors, random_tensors, safetensors_bytes, write_tiny

ZERO = np.zeros(1, np.float32)
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture
def tensors() -> Tensors:
    return random_tensors(from_hf(TINY))


def refusal(path: Path, error: type[BuildError] = UnsupportedError) -> str:
    """The one line that opening `path` ends with; it never sends anybody to fetch what is whole."""
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    assert "fetch the checkpoint again" not in text
    return text


def write_safetensors(file: Path, tensors: dict[str, Any]) -> None:
    pytest.importorskip("safetensors.numpy").save_file(tensors, file)


# Names


def test_names_without_the_prefix_are_those_with_it(tensors: Tensors, tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    assert "layers.0.mlp.up_proj.weight" in bare and "lm_head.weight" in bare
    checkpoint = open_checkpoint(write_tiny(tmp_path / "c", bare))
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)
    both = {**tensors, "norm.weight": tensors["model.norm.weight"]}
    assert "'norm.weight' is in both" in refusal(write_tiny(tmp_path / "c", both), CheckpointError)


UNUSED = {
    "rotary tables": {f"{ATTENTION}.rotary_emb.{name}": ZERO for name in ("inv_freq", "cos_cached", "sin_cached")},
    "rotary tables of the model": {"model.rotary_emb.inv_freq": ZERO, "rotary_emb.original_inv_freq": ZERO},
    "masks": {
        f"{ATTENTION}.bias": np.ones((1, 1, 8, 8), bool), f"{ATTENTION}.masked_bias": np.array(-1e4, np.float32),
        "model.layers.1.attn.bias": np.ones((1, 1, 8, 8), np.uint8),
    },
    "cache scales": {f"{ATTENTION}.{name}_scale": ZERO for name in "qkv"} | {f"{ATTENTION}.attn.kv_scale": ZERO},
    "cache scales beside the layers": {
        f"{ATTENTION}.{name}": ZERO for name in ("k_proj.k_scale", "v_proj.v_scale", "k_proj.output_scale")
    },
    "value heads": {"v_head.summary.weight": np.zeros((1, 8), np.float32), "v_head.summary.bias": ZERO},
    "a classifier": {"score.weight": np.zeros((2, 8), np.float32)},
    "positions": {"model.position_ids": np.arange(4)},
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSED)
def test_tensors_that_take_no_part_are_left_out(kind: str, tensors: Tensors, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c", tensors)
    write_safetensors(path / "model.safetensors", {**tensors, **UNUSED[kind]})
    checkpoint = open_checkpoint(path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(checkpoint.read(name), array)


@pytest.mark.parametrize(
    "name",
    [
        f"{ATTENTION}.bias",  # a vector: not a mask
        f"{ATTENTION}.sinks",
        f"{ATTENTION}.q_norm.weight",
        "model.layers.0.mlp.k_scale",
        "lm_head.bias",
        "model.embed_positions.weight",
        "scores.weight",
        "head.weight",
        "model.v_headless.weight",
    ],
)
def test_all_others_are_refused_by_name(name: str, tensors: Tensors, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c", {**tensors, name: np.zeros(8, np.float32)})
    assert f"{name!r} is not part of a llama model" in refusal(path, CheckpointError)


# Other methods of quantisation

PACKED = np.zeros((8, 1), np.int32)
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "AWQ": (
        {"quant_method": "awq", "bits": 4},
        {"q_proj.qweight": PACKED, "q_proj.scales": np.ones((1, 8), np.float16)},
        "AWQ (4-bit integers)",
    ),
    "actorder": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"q_proj.weight_g_idx": np.zeros(8, np.int32)},
        "compressed-tensors",
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4},
        {"q_proj.qweight": PACKED, "q_proj.g_idx": np.zeros(8, np.int32)},
        "GPTQ (integers)",
    ),
    "NF4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"q_proj.weight.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)},
        "bitsandbytes NF4",
    ),
    "int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"q_proj.SCB": np.zeros(8, np.float32)},
        "bitsandbytes",
    ),
    "EETQ": ({"quant_method": "eetq"}, {"q_proj.weight_scales": np.zeros(8, np.float16)}, "EETQ"),
    "HQQ": ({"quant_method": "hqq"}, {"q_proj.W_q": np.zeros((8, 4), np.uint8)}, "HQQ"),
    "torchao": ({"quant_method": "torchao"}, {"q_proj._weight_qdata": np.zeros((8, 8), np.int8)}, "torchao"),
    "packed": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"q_proj.weight_packed": PACKED},
        "compressed-tensors",
    ),
    "AQLM": ({"quant_method": "aqlm"}, {"q_proj.codebooks": np.zeros((1, 4), np.float16)}, "AQLM"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_known_by_its_configuration_and_by_its_tensors(
    method: str, tensors: Tensors, tmp_path: Path
) -> None:
    config, marks, words = METHODS[method]
    path = write_tiny(tmp_path / "c", tensors, quantization_config=config)
    text = refusal(path)
    assert words in text and "config.json: quantization_config has" in text and "give the checkpoint" in text
    others = {name: array for name, array in tensors.items() if not name.endswith("q_proj.weight")}
    write_tiny(path, tensors)
    marked = {f"{ATTENTION}.{name}": array for name, array in marks.items()}
    write_safetensors(path / "model.safetensors", {**others, **marked})
    text = refusal(path)
    assert words.split(" ")[0] in text and f"{ATTENTION}." in text and "give the checkpoint" in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "something-new"}}, "a method unknown here (something-new)"),
        ({"quantization_config": {"bits": 4}}, "a method unknown here (None)"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes FP4 (4 bits)"),
        ({"quantization_config": {"w_bit": 4}}, "AWQ"),
        ({"quantization_config": {"quant_method": "auto_round"}}, "AutoRound"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ],
)
def test_any_other_configuration_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(write_tiny(tmp_path / "c", **config))


def test_integers_without_a_method(tensors: Tensors, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c", tensors)
    name = f"{ATTENTION}.q_proj.weight"
    write_safetensors(path / "model.safetensors", {**tensors, name: np.zeros((8, 8), np.uint8)})
    text = refusal(path)
    assert f"{name!r} has dtype 'U8'" in text and "of a quantised checkpoint" in text


def test_an_empty_configuration_of_a_quantisation_is_none(tmp_path: Path) -> None:
    assert open_checkpoint(write_tiny(tmp_path / "c", quantization_config=None)).fp8 is None


# Other formats


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "consolidated.00.pth"]
)
def test_pickles_are_named_with_the_command_that_converts_them(name: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c")
    (path / "model.safetensors").rename(path / name)
    text = refusal(path)
    assert f"{name} is a pickle" in text and "save_pretrained" in text
    assert f"{name} is a pickle" in refusal(path / name)


def test_pickles_beside_safetensors_are_not_looked_at(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c")
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.safetensors", "adapter_model.safetensors"):
        (path / name).write_bytes(b"weights")
    open_checkpoint(path)


@pytest.mark.parametrize(("name", "message"), [("tf_model.h5", "TensorFlow's"), ("flax_model.msgpack", "Flax's")])
def test_other_formats(name: str, message: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c")
    (path / "model.safetensors").rename(path / name)
    assert message in refusal(path)


def test_a_file_of_a_checkpoint_is_not_the_checkpoint(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c")
    assert f"give its directory, {path}" in refusal(path / "model.safetensors", CheckpointError)
    (tmp_path / "model.gguf.part1of2").write_bytes(b"")
    assert "join the pieces with cat" in refusal(tmp_path / "model.gguf.part1of2")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    assert "Meta's or Mistral's own layout" in refusal(tmp_path / "meta")


@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_is_not_a_model(has_config: bool, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c")
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("{}")
    shutil.copyfile(path / "adapter_model.safetensors", path / "model.safetensors")
    assert "holds a model and an adapter; move the adapter_ files" in refusal(path)
    (path / "model.safetensors").unlink()
    if not has_config:
        (path / "config.json").unlink()
    assert f"is an adapter, not a model: build the model that it was trained on, with --adapter {path}" in refusal(path)


@pytest.mark.parametrize(
    ("model_type", "needs"),
    [
        ("deepseek_v4", "attention over compressed tokens, sinks, and hyper-connections of four streams"),
        ("kimi_k2", "DeepSeek-V3's layers"),
        ("qwen3_moe", "experts without latent attention"),
    ],
)
def test_architectures_of_this_family_that_are_not_supported_yet(model_type: str, needs: str, tmp_path: Path) -> None:
    text = refusal(write_tiny(tmp_path / "c", model_type=model_type, tensors=random_tensors(from_hf(TINY))))
    assert "not supported yet" in text and "config.json" in text and repr(model_type) in text and needs in text


# What is missing

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def write_shards(path: Path, tensors: Tensors) -> dict[str, str]:
    """Three shards; returns tensor → file."""
    write_tiny(path, tensors)
    (path / "model.safetensors").unlink()
    weight_map = {name: SHARDS[i % 3] for i, name in enumerate(tensors)}
    for shard in SHARDS:
        held = {name: array for name, array in tensors.items() if weight_map[name] == shard}
        (path / shard).write_bytes(safetensors_bytes(held))
    return weight_map


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard_is_named_and_the_others_are_not_to_be_fetched(
    has_index: bool, tensors: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    weight_map = write_shards(path, tensors)
    if has_index:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    open_checkpoint(path)
    (path / SHARDS[1]).unlink()
    text = refusal(path, CheckpointError)
    assert f"{SHARDS[1]}: No such file or directory; fetch this file (1 of the 3 files" in text
    partial = path / ".cache" / "huggingface" / "download"
    partial.mkdir(parents=True)
    (partial / "abc.incomplete").write_bytes(b"")
    assert "its download was interrupted: run the same hf download again" in refusal(path, CheckpointError)


def cached(root: Path, source: Path) -> Path:
    """`source` as huggingface_hub's cache has it: links to blobs."""
    cache = root / "models--deepseek-ai--Tiny-R1"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    (cache / "blobs").mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, cache / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    return snapshot


def test_snapshots_of_the_cache_are_read_through_their_links(tensors: Tensors, tmp_path: Path) -> None:
    snapshot = cached(tmp_path, write_tiny(tmp_path / "c", tensors))
    for path in (snapshot, snapshot.parent.parent):
        checkpoint = open_checkpoint(path)
        np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), tensors["model.norm.weight"])
        assert model_name(checkpoint.path) == "deepseek-ai/Tiny-R1"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", SHARDS[2]])
def test_a_snapshot_with_a_link_to_nothing_is_incomplete(name: str, tensors: Tensors, tmp_path: Path) -> None:
    source = tmp_path / "c"
    weight_map = write_shards(source, tensors)
    if name == "model.safetensors":
        write_tiny(source, tensors)
        for shard in SHARDS:
            (source / shard).unlink()
    else:
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    snapshot = cached(tmp_path, source)
    blob = tmp_path / "models--deepseek-ai--Tiny-R1" / "blobs" / f"blob-{name}"
    blob.rename(f"{blob}.incomplete")
    text = refusal(snapshot, CheckpointError)
    assert f"{name} is a link to a blob that is not there (its download was interrupted)" in text
    assert "hf download deepseek-ai/Tiny-R1 --revision 0123abc" in text
    (snapshot / name).unlink()
    if name in SHARDS:
        assert f"{name} is not in the snapshot" in refusal(snapshot, CheckpointError)


def test_a_link_to_nothing_outside_a_cache(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "is a link to" in refusal(path, CheckpointError)
    (tmp_path / "m.gguf").symlink_to(tmp_path / "gone")
    assert "is a link to" in refusal(tmp_path / "m.gguf", CheckpointError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
def test_a_git_lfs_pointer_is_not_the_file(name: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "c")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4683073248\n"
    (path / name).write_text(pointer)
    text = refusal(path / name if name.endswith("gguf") else path, CheckpointError)
    assert f"{name} is a git-lfs pointer" in text and f"git -C {path} lfs pull" in text
