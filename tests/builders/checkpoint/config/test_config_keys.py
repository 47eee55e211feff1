"""Keys that nothing reads are named; sliding windows that no layer uses, and stretched lengths, are accepted."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_triton.builders.checkpoint.config.gguf_metadata import unknown_gguf_keys
from deepseek_triton.builders.checkpoint.config.hf_config import from_hf, unknown_config_keys
from deepseek_triton.builders.checkpoint.config.known_keys import GENERATION_KEYS, UNSERVED_DECODING, config_keys
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from tests.builders.checkpoint.config.test_spec import R1_0528_QWEN3, config, gguf, read_gguf

WARNING = "warning: {} has keys that are not known here and have no effect: {}"
# What published checkpoints of each family carry beside their dimensions, as their files have it.
PUBLISHED: dict[str, dict[str, Any]] = {
    "R1-Distill-Qwen": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 28, "sliding_window": 4096,
        "torch_dtype": "bfloat16", "transformers_version": "4.44.0", "use_cache": True, "use_mrope": False,
        "use_sliding_window": False,
    },
    "Qwen2.5-7B-Instruct-1M": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768},
    "DeepSeek-Coder-6.7B": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1, "rope_theta": 100000,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "max_position_embeddings": 256, "use_cache": True,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    },
    "DeepSeek-LLM-7B": {
        "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
        "_name_or_path": "/path", "rope_scaling": None,
    },
    "Llama-3.2": {
        "model_type": "llama", "eos_token_id": [1, 2, 3], "head_dim": 16, "mlp_bias": False, "attention_bias": False,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64, "rope_type": "llama3",
        },
    },
    "SmolLM2": {
        "model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "pad_token_id": 2,
        "transformers.js_config": {"dtype": "q4"},
    },
    "Qwen3": {
        "model_type": "qwen3", "attention_bias": False, "max_window_layers": 36, "sliding_window": None,
        "use_sliding_window": False, "head_dim": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_without_a_warning(name: str) -> None:
    values = config(**PUBLISHED[name])
    from_hf(values)
    assert unknown_config_keys(values) == ()


def test_r1_0528_is_read_without_a_warning() -> None:
    assert unknown_config_keys(R1_0528_QWEN3) == ()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_that_transformers_writes_is_read_without_a_warning(architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.AutoConfig.for_model(architecture)
    values = {**written.to_dict(), "model_type": architecture}
    if architecture == "deepseek_v2":
        values["num_experts_per_tok"] = 6  # without which its class computes nothing
    from_hf(values)
    assert unknown_config_keys(values) == ()


def test_every_decoding_option_of_transformers_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    values = {key: 1 for key in transformers.GenerationConfig().to_dict()}
    assert set(GENERATION_KEYS.unknown_keys(values)) <= UNSERVED_DECODING.keys()


def test_keys_in_no_table_are_named() -> None:
    values = config(
        "qwen3", final_logit_softcapping=30.0, mlp_bias=True, logit_scale=None,
        rope_scaling={"type": "linear", "factor": 2.0, "alpha": 5, "original_max_position_embeddings": 64},
    )  # fmt: skip
    names = "final_logit_softcapping, mlp_bias, rope_scaling.alpha"
    assert unknown_config_keys(values) == (WARNING.format("config.json", names),)
    unused = config("llama", rope_parameters={"rope_type": "default", "factor": 4.0}, sliding_window=16)
    names = "sliding_window, rope_parameters.factor"
    assert unknown_config_keys(unused) == (WARNING.format("config.json", names),)


def test_the_class_of_another_model_is_named() -> None:
    for name in ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"):
        assert unknown_config_keys(config(architectures=[name])) == ()
    (warning,) = unknown_config_keys(config(architectures=["Qwen2ForCausalLM"]))
    assert "architectures 'Qwen2ForCausalLM' beside model_type 'llama': model_type counts" in warning


def test_gguf_keys_in_no_table_are_named() -> None:
    metadata = gguf(changes={"rope.freq_base": 5e5, "attention.mystery": 2})
    assert unknown_gguf_keys(metadata) == (WARNING.format("the GGUF", "llama.attention.mystery"),)
    assert (
        unknown_gguf_keys({**gguf(), "general.name": "x", "split.count": 2, "mradermacher.quantize_version": "2"}) == ()
    )
    other = {**gguf(), "tokenizer.ggml.pre_rules": "x", "qwen2.context_length": 64}
    assert unknown_gguf_keys(other) == (WARNING.format("the GGUF", "tokenizer.ggml.pre_rules, qwen2.context_length"),)


def test_a_new_architecture_has_the_keys_of_all_others() -> None:
    assert config_keys("toy").unknown_keys({"mlp_bias": True, "sliding_window": 4, "mystery": 1}) == ["mystery"]


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 16},  # max_window_layers is 28 where it isn't said
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 0},  # as long as the model's sequences
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 3},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0},
    ],
)
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_windows_that_no_layer_uses_are_accepted(architecture: str, changes: dict[str, Any]) -> None:
    values = config(architecture, **changes)
    from_hf(values)
    assert unknown_config_keys(values) == ()


def test_a_window_that_yarn_outgrows_is_refused() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    with pytest.raises(Exception, match="fewer than the model's 1024"):
        from_hf(config("qwen2", rope_scaling=yarn, use_sliding_window=True, sliding_window=256, max_window_layers=0))


def test_the_longest_sequence_follows_the_scaling() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert from_hf(config("qwen2", max_position_embeddings=64, rope_scaling=yarn)).max_seq_len == 256
    assert from_hf(config("qwen2", max_position_embeddings=512, rope_scaling=yarn)).max_seq_len == 512
    dynamic = {"type": "dynamic", "factor": 2.5}
    assert from_hf(config(rope_scaling=dynamic)).max_seq_len == 640
    assert from_hf(config(rope_scaling={"type": "linear", "factor": 4.0})).max_seq_len == 256
    changes = {"context_length": 64, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    assert read_gguf(gguf(changes=changes)).max_seq_len == 256


def test_rope_scaling_counts_where_rope_parameters_stand_beside_it() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    both = config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_scaling=scaling)
    assert from_hf(both).rope == from_hf(config(rope_scaling=scaling)).rope
    theta = config(rope_parameters={"rope_theta": 1e6}, rope_scaling={**scaling, "rope_theta": 1e6})
    assert from_hf(theta).rope.theta == 1e6
    assert from_hf(config(rope_parameters={"rope_theta": 1e6}, rope_scaling=scaling, rope_theta=1e6)).rope.theta == 1e6
    empty = config(rope_parameters={"rope_type": "linear", "factor": 2.0}, rope_scaling={})
    assert from_hf(empty).rope.scaling == "linear"


def test_rope_type_counts_where_type_stands_beside_it() -> None:
    both = {"rope_type": "linear", "type": "dynamic", "factor": 2.0}
    assert from_hf(config(rope_scaling=both)).rope.scaling == "linear"
    assert from_hf(config(rope_scaling={**both, "rope_type": None})).rope.scaling == "dynamic"
