"""DeepSeek-V2 and V3 as Hugging Face and as GGUF files hold them: the same decoder, tensor by tensor."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.config.gguf_metadata import from_gguf
from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.gguf_checkpoint import strict_reader
from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from tests.support.checkpoints import LATENT_SMALL, make_checkpoint, rope, safetensors_bytes
from tests.support.gguf_files import k_quant_blocks
from tests.support.latent_gguf import write_latent_gguf

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.numpy")

Array = NDArray[Any]


def stored(directory: Path) -> dict[str, Array]:
    """The tensors of a checkpoint's one file, as they lie there."""
    tensors: dict[str, Array] = safetensors.load_file(directory / "model.safetensors")
    return tensors


def assert_same_tensors(found: Checkpoint, expected: Checkpoint, atol: float = 0.0) -> None:
    for name in expected.spec.tensor_shapes():
        np.testing.assert_allclose(found.read(name), expected.read(name), atol=atol, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("splits_kv_b", [False, True], ids=["kv_b", "k_b and v_b"])
@pytest.mark.parametrize("option", ["v2", "v2-lite", "v2-groups", "v3", "v3-stretched", "v3-halves", "v3-linear"])
def test_gguf_gives_what_hugging_face_gives(option: str, splits_kv_b: bool, tmp_path: Path) -> None:
    more: dict[str, Any] = {"rope_interleave": True} if option == "v3-halves" else {}  # which llama.cpp has no key for
    if option == "v3-linear":
        more = rope("linear", factor=4.0, mscale_all_dim=1.0)
    directory = make_checkpoint(tmp_path / "hf", "v3" if option == "v3-linear" else option, **more)
    expected = open_checkpoint(directory)
    found = open_checkpoint(
        write_latent_gguf(tmp_path / "m.gguf", expected.spec, stored(directory), splits_kv_b=splits_kv_b)
    )
    assert found.notes == ()
    spec, wanted = found.spec, expected.spec
    assert spec.latent is not None and wanted.latent is not None and spec.experts is not None
    assert spec.latent.softmax_factor == pytest.approx(wanted.latent.softmax_factor)
    assert spec.experts.scale == pytest.approx(wanted.experts.scale if wanted.experts else 0)
    assert spec.rms_norm_eps == pytest.approx(wanted.rms_norm_eps)
    told = replace(spec.rope, original_max_position_embeddings=wanted.rope.original_max_position_embeddings)
    own = spec.rope if spec.rope.scaling == "yarn" else told  # the others don't read it
    assert replace(spec, rms_norm_eps=wanted.rms_norm_eps, latent=wanted.latent, rope=own) == wanted
    assert replace(spec.latent, softmax_factor=wanted.latent.softmax_factor) == wanted.latent
    assert_same_tensors(found, expected)


def assert_a_gguf_is_read(option: str, directory: Path, **writing: Any) -> None:
    checkpoint = make_checkpoint(directory / "hf", option)
    expected = open_checkpoint(checkpoint)
    found = open_checkpoint(write_latent_gguf(directory / "m.gguf", expected.spec, stored(checkpoint), **writing))
    assert_same_tensors(found, expected)


def test_gate_and_up_may_be_one_stack(tmp_path: Path) -> None:
    assert_a_gguf_is_read("v3", tmp_path, splits_kv_b=True, joins_gate_up=True)


def test_a_file_may_have_kv_b_and_its_halves(tmp_path: Path) -> None:
    def add_halves(writer: Any) -> None:
        for layer in range(3):
            writer.add_tensor(f"blk.{layer}.attn_k_b.weight", np.zeros((4 * 32, 16), np.float32))
            writer.add_tensor(f"blk.{layer}.attn_v_b.weight", np.zeros((4 * 12, 32), np.float32))

    assert_a_gguf_is_read("v2", tmp_path, splits_kv_b=False, change=add_halves)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.scaling.attn_factor", 0.5, "rope.scaling.attn_factor 0.5 beside a yarn_log_multiplier"),
        ("expert_shared_feed_forward_length", 32, "expert_shared_feed_forward_length 32: only 24"),
        ("attention.indexer.head_count", 64, "attention.indexer.head_count 64"),
        ("attention.temperature_scale", 0.1, "attention.temperature_scale"),
        ("swiglu_clamp_exp", [10.0], "swiglu_clamp_exp"),
        ("moe_every_n_layers", 2, "moe_every_n_layers 2"),
        ("expert_group_scale", 0.5, "expert_group_scale"),
        ("nextn_predict_layers", 1, "nextn_predict_layers 1"),
        ("expert_gating_func", 3, "expert_gating_func 3"),
    ],
)
def test_metadata_that_changes_the_model_is_refused(key: str, value: Any, message: str) -> None:
    metadata = {
        "general.architecture": "deepseek2", "deepseek2.expert_count": 8, "deepseek2.expert_used_count": 2,
        "deepseek2.expert_feed_forward_length": 24, "deepseek2.expert_shared_count": 1,
        "deepseek2.expert_gating_func": 2, "deepseek2.rope.dimension_count": 8, "deepseek2.attention.key_length": 24,
        "deepseek2.attention.value_length": 12, "deepseek2.attention.kv_lora_rank": 32,
        "deepseek2.rope.scaling.type": "yarn", "deepseek2.rope.scaling.factor": 4.0,
        "deepseek2.rope.scaling.yarn_log_multiplier": 0.1, "deepseek2.attention.head_count": 4,
        "deepseek2.embedding_length": 64, "deepseek2.feed_forward_length": 96, "deepseek2.block_count": 3,
        "deepseek2.context_length": 256, "deepseek2.attention.layer_norm_rms_epsilon": 1e-6,
    }  # fmt: skip
    assert from_gguf(metadata, (), vocab_size=320).latent is not None
    with pytest.raises(UnsupportedError, match=message):
        from_gguf({**metadata, f"deepseek2.{key}": value}, (), vocab_size=320)


@pytest.mark.parametrize(
    ("name", "needs"),
    [("deepseek32", "an indexer"), ("deepseek4", "hyper-connections"), ("deepseek", "without latent")],
)
def test_other_architectures_of_this_family_are_refused_by_name(name: str, needs: str) -> None:
    with pytest.raises(UnsupportedError, match=f"architecture '{name}' has .*{needs}.*: not supported yet"):
        from_gguf({"general.architecture": name}, (), vocab_size=320)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_every_matrix_may_be_quantised(kind: str, tmp_path: Path) -> None:
    """Each of the tensors, stacked or transposed as they lie in the file, is what gguf itself makes of its bytes."""
    is_k = kind.endswith("K")
    sizes = {"hidden_size": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 256, "moe_intermediate_size": 256}
    small = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "moe_intermediate_size": 32}
    more: dict[str, Any] = {
        **(sizes if is_k else small),
        "num_hidden_layers": 2,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 2,
    }
    spec = open_checkpoint(make_checkpoint(tmp_path / "hf", "v3", **more)).spec
    tensors = {
        name: (np.random.default_rng(number).normal(size=shape) / 8).astype(np.float32)
        for number, (name, shape) in enumerate(spec.tensor_shapes().items())
    }
    own: dict[str, Any] = {"encode": k_quant_blocks} if is_k else {}
    quantization = gguf.GGMLQuantizationType[kind]
    path = write_latent_gguf(tmp_path / "m.gguf", spec, tensors, splits_kv_b=True, quantization=quantization, **own)
    raw = {tensor.name: tensor for tensor in strict_reader(path).tensors}
    plain = {name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for name, tensor in raw.items()}
    found = open_checkpoint(path)
    experts = plain["blk.1.ffn_down_exps.weight"]
    assert raw["blk.1.ffn_down_exps.weight"].tensor_type.name == kind
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        np.testing.assert_array_equal(found.read(name), experts[expert])
    halves = [plain["blk.1.attn_k_b.weight"].transpose(0, 2, 1), plain["blk.1.attn_v_b.weight"]]
    kv_b = np.concatenate(halves, axis=1).reshape(-1, spec.latent.kv_lora_rank if spec.latent else 0)
    np.testing.assert_array_equal(found.read("model.layers.1.self_attn.kv_b_proj.weight"), kv_b)
    if not is_k:  # whose numbers here are random bytes, not those of the weights
        for name, array in tensors.items():
            values = found.read(name)
            if "q_b_proj" not in name and "kv_a_proj" not in name:  # whose rotary rows change their places
                assert np.abs(values - array).max() < np.abs(array).max() / 6, name


def test_files_of_before_the_group_keys_have_v3s_groups() -> None:
    from deepseek_triton.builders.checkpoint.config.gguf_deepseek import experts_from_gguf

    values = {
        "expert_count": 256, "expert_used_count": 8, "expert_feed_forward_length": 2048, "expert_gating_func": 2,
        "expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_shared_count": 1,
    }  # fmt: skip
    experts = experts_from_gguf(values)
    assert (experts.num_groups, experts.topk_group, experts.choice) == (8, 4, "group_top2")
    with pytest.raises(UnsupportedError, match="expert_gating_func 3"):
        experts_from_gguf({**values, "expert_gating_func": 3})


def test_a_missing_and_a_wrong_expert_are_named(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "hf", "v3")
    tensors = stored(directory)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    for change in ({name: tensors[name][:-1]}, {}):
        rest = {key: value for key, value in tensors.items() if key != name}
        (directory / "model.safetensors").write_bytes(safetensors_bytes({**rest, **change}))
        with pytest.raises(CheckpointError, match=re.escape(name)):
            open_checkpoint(directory)


def test_layers_that_predict_further_tokens_are_left_out_and_told(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "hf", "v3")
    tensors = stored(directory)
    further = {name.replace("layers.2.", "layers.3."): array for name, array in tensors.items() if "layers.2." in name}
    further["model.layers.3.eh_proj.weight"] = np.zeros((64, 128), np.float32)
    (directory / "model.safetensors").write_bytes(safetensors_bytes({**tensors, **further}))
    config = json.loads((directory / "config.json").read_text())
    config.pop("num_mtp_layers", None)
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    checkpoint = open_checkpoint(directory)
    assert checkpoint.spec.num_layers == 3
    assert "1 layers that predict further tokens are left out" in checkpoint.notes
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3"):
        open_checkpoint(directory)


@pytest.mark.parametrize("key", ["rope_interleave", "norm_topk_prob", "attention_bias"])
def test_switches_are_true_false_or_as_transformers_reads_null(key: str) -> None:
    values = {"model_type": "deepseek_v3", **LATENT_SMALL, "n_group": 4, "topk_group": 2}

    def switched(**changes: Any) -> bool:
        spec = from_hf({**values, **changes})
        assert spec.latent is not None and spec.experts is not None
        switches = spec.latent.is_interleaved, spec.experts.is_normalised, spec.latent.has_bias
        return dict(zip(("rope_interleave", "norm_topk_prob", "attention_bias"), switches, strict=True))[key]

    assert switched() == (key != "attention_bias")
    assert switched(**{key: True})
    assert not switched(**{key: False})
    assert not switched(**{key: None})
    for value in ("false", 0):
        with pytest.raises(CheckpointError, match=f"{key} is {value!r}, must be true or false"):
            switched(**{key: value})
