from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.config.gguf_metadata import from_gguf
from deepseek_triton.builders.checkpoint.config.hf_config import from_hf, with_ends
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from deepseek_triton.builders.graph.rope import inverse_frequencies, rope_tables
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.errors import SpecError
from deepseek_triton.ensemble.decoder.rope import RopeSpec
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from tests.support.checkpoints import SMALL

LLAMA3: dict[str, Any] = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 64}
# rope type → its parameters, and the RopeSpec they make at theta 5e5 and 256 positions
ROPES: dict[str, tuple[dict[str, Any], RopeSpec]] = {
    "default": ({}, RopeSpec(5e5)),
    "linear": ({"factor": 4.0}, RopeSpec(5e5, "linear", 4.0, 256)),
    "dynamic": ({"factor": 2.0}, RopeSpec(5e5, "dynamic", 2.0, 256)),
    "llama3": (LLAMA3, RopeSpec(5e5, "llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)),
    "yarn": (YARN, RopeSpec(5e5, "yarn", 4.0, 64, attention_factor=0.1 * math.log(4) + 1)),
}
# Those with grouped-query attention in every layer; the others have dimensions of their own.
DENSE = [name for name, architecture in ARCHITECTURES.items() if not architecture.is_latent]
SUPPORTED = ", ".join(sorted(ARCHITECTURES))
STYLES = ("transformers 4", "transformers 4, type", "transformers 5")

# https://huggingface.co/deepseek-ai/DeepSeek-R1-0528-Qwen3-8B/blob/main/config.json
R1_0528_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 131072,
    "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "attn_factor": 0.8782488562869419, "factor": 4.0, "original_max_position_embeddings": 32768,
        "rope_type": "yarn",
    },
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    values = {"model_type": model_type, **SMALL, **changes}
    return {key: value for key, value in values.items() if value is not ...}


def roped(style: str, kind: str, parameters: dict[str, Any]) -> dict[str, Any]:
    if style == "transformers 5":
        return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **parameters}}
    name = "type" if style.endswith("type") else "rope_type"
    return {"rope_theta": 5e5, "rope_scaling": {name: kind, **parameters} if kind != "default" else None}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("architecture", DENSE)
def test_each_architecture_and_rope_in_both_styles(architecture: str, kind: str, style: str) -> None:
    parameters, rope = ROPES[kind]
    spec = from_hf(config(architecture, **roped(style, kind, parameters)))
    head_dim = 128 if architecture == "qwen3" else 16
    assert spec == ModelSpec(
        architecture, vocab_size=320, hidden_size=64, intermediate_size=112, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=head_dim, rms_norm_eps=1e-5, max_position_embeddings=256, tie_word_embeddings=False,
        qkv_bias=architecture == "qwen2", qk_norm=architecture == "qwen3", eos_token_ids=(319,), rope=rope,
    )  # fmt: skip


def test_r1_0528_qwen3_scales_no_attention() -> None:
    spec = from_hf(R1_0528_QWEN3)
    # mscale(4) = 0.1 ln 4 + 1, which the file's attn_factor takes back
    assert spec.rope.attention_factor == pytest.approx(1.0, abs=1e-6)
    assert (spec.rope.scaling, spec.rope.factor, spec.rope.original_max_position_embeddings) == ("yarn", 4.0, 32768)
    assert (spec.num_heads * spec.head_dim, spec.qk_norm, spec.qkv_bias) == (4096, True, False)
    assert spec.num_parameters() == 8_190_735_360


def test_the_number_of_parameters_of_r1_distill_qwen_7b() -> None:
    spec = from_hf(
        config(
            "qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, eos_token_id=151643, use_sliding_window=False,
            sliding_window=4096, max_position_embeddings=131072,
        )
    )  # fmt: skip
    assert spec.num_parameters() == 7_615_616_512


def test_options_have_the_architecture_s_own_meaning() -> None:
    llama = from_hf(config(attention_bias=True, mlp_bias=True))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = from_hf(config("qwen2", attention_bias=True))  # qwen2 has no such option: the output has no bias
    assert (qwen2.qkv_bias, qwen2.o_bias) == (True, False)
    assert from_hf(config(num_key_value_heads=None)).num_kv_heads == 4
    assert from_hf(config(head_dim=24)).head_dim == 24
    shapes = from_hf(config(tie_word_embeddings=True)).tensor_shapes()
    assert "lm_head.weight" not in shapes and len(shapes) == 2 + 3 * 9


def test_end_tokens_are_those_of_both_files() -> None:
    assert from_hf(config(eos_token_id=None)).eos_token_ids == ()
    assert from_hf(config(eos_token_id=[3, 5, 3])).eos_token_ids == (3, 5)
    assert with_ends(from_hf(config()), {"eos_token_id": [7, 319]}).eos_token_ids == (319, 7)
    assert with_ends(from_hf(config(eos_token_id=...)), {"eos_token_id": 7}).eos_token_ids == (7,)
    silent: list[dict[str, Any]] = [{"temperature": 0.6}, {"eos_token_id": None}, {"eos_token_id": []}]
    for generation in silent:
        assert with_ends(from_hf(config()), generation).eos_token_ids == (319,)


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for architecture in DENSE:
        values = config(architecture, num_attention_heads=32, hidden_size=64)
        for key in ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_theta"):
            values.pop(key, None)
        spec = from_hf(values)
        reference = transformers.AutoConfig.for_model(**values)
        assert spec.head_dim == getattr(reference, "head_dim", 64 // 32), architecture
        assert spec.num_kv_heads == reference.num_key_value_heads
        assert spec.rms_norm_eps == reference.rms_norm_eps
        assert spec.tie_word_embeddings == reference.tie_word_embeddings
        assert spec.rope == RopeSpec(reference.rope_parameters["rope_theta"])
        assert from_hf({**values, "num_key_value_heads": None}).num_kv_heads == 32


@pytest.mark.parametrize("name", ["gemma", None, ["llama"]])
def test_an_unsupported_architecture_is_named_beside_those_supported(name: Any) -> None:
    with pytest.raises(UnsupportedError) as error:
        from_hf(config(name))
    assert str(error.value) == f"architecture {name!r} is not supported; supported: {SUPPORTED}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 16}, "sliding window of 16 tokens"),
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "sliding_window": 16}, "sliding window"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "'linear_attention'"),
        ({"use_mrope": True}, "use_mrope True"),
        ({"is_causal": False}, "is_causal False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"rope_interleaved": True}, "rope_interleaved True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder True"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "'Qwen2ForSequenceClassification'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention apart"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "'su'"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn", "full": {}}}, "full apart"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'.*llama3, yarn"),
        ({"rope_scaling": {"rope_type": "factors", "factor": 2.0}}, "'factors'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "not supported"),
    ],
)
def test_options_without_an_implementation_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        from_hf(config("qwen2", **changes))


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [..., None, 0, -1, 2.5, "64", True, [1], 2**40, math.nan])
def test_dimensions_must_be_positive_whole_numbers(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"^{key} is "):
        from_hf(config(**{key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_heads is 4, must be a multiple of num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim is 15, must be even"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "head_dim is 2, dynamic rope scaling"),
        ({"num_attention_heads": 65, "num_key_value_heads": 65}, "head_dim is 0"),
        ({"num_hidden_layers": 10**8}, "num_layers is 100000000, must be at most"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"eos_token_id": 320}, "eos_token_id is 320, outside the vocabulary of 320"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [1, "</s>"]}, "eos_token_id is '</s>'"),
        ({"rope_theta": 0}, "theta is 0.0"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_scaling": [1]}, "rope parameters"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"factor": 4.0}}, "have factor 4.0 and no rope_type; say which: default, linear"),
        (
            {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta 1e[+]06 it would replace by 10000: put",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types is .*3 entries"),
        ({"attention_bias": "false"}, "attention_bias is 'false', must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, must be"),
        ({"rope_scaling": {"type": "dynamic"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5, must be a number of at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor is nan"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": None}}, "low_freq_factor is missing"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor is 1.0"),
        ({"rope_scaling": {"type": "yarn", **YARN, "attention_factor": -1}}, "attention_factor is -1.0"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_slow": 64}}, "beta_slow is 64.0"),
        ({"rope_scaling": {"type": "yarn", **YARN, "original_max_position_embeddings": 0}}, "is 0, must be"),
        ({"rope_scaling": {"type": "yarn", **YARN, "truncate": "false"}}, "truncate is 'false', must be true or false"),
        ({"layer_types": ["full_attention"] * 3, "use_sliding_window": "no"}, "use_sliding_window is 'no'"),
    ],
)
def test_values_out_of_range_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        from_hf(config(**changes))
    assert "\n" not in str(error.value)


def gguf(architecture: str = "llama", changes: dict[str, Any] | None = None) -> dict[str, Any]:
    values = {
        "embedding_length": 64, "feed_forward_length": 112, "block_count": 3, "context_length": 256,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5e5, "rope.dimension_count": 16, **(changes or {}),
    }  # fmt: skip
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.eos_token_id": 319,
        **{f"{architecture}.{key}": value for key, value in values.items() if value is not ...},
    }


def read_gguf(metadata: dict[str, Any], *tensors: str, **options: Any) -> ModelSpec:
    return from_gguf(metadata, tensors or ("output.weight",), vocab_size=320, **options)


@pytest.mark.parametrize("architecture", DENSE)
def test_gguf_metadata_makes_the_same_spec_as_a_config(architecture: str) -> None:
    assert read_gguf(gguf(architecture)) == from_hf(config(architecture, rope_theta=5e5, head_dim=16))


def test_gguf_says_by_its_tensors_which_biases_and_which_head_there_are() -> None:
    spec = read_gguf(
        gguf(), "blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_gate.bias"
    )  # fmt: skip
    expected = from_hf(config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_theta=5e5))
    assert spec == expected


def test_gguf_end_tokens_are_all_that_it_names_once_each() -> None:
    metadata = {**gguf(), "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 319}
    assert read_gguf(metadata).eos_token_ids == (319, 7)


def test_gguf_rope_scalings() -> None:
    scaled: dict[str, Any] = {"rope.scaling.factor": 4.0}
    assert read_gguf(gguf(changes={"rope.scaling.type": "none", **scaled})).rope == RopeSpec(5e5)
    assert read_gguf(gguf(changes={"rope.scaling.type": "linear", **scaled})).rope == RopeSpec(5e5, "linear", 4.0)
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 64, **scaled}
    assert read_gguf(gguf(changes=yarn)).rope == ROPES["yarn"][1]
    betas = {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 0.5}
    rope = read_gguf(gguf(changes={**yarn, **betas})).rope
    assert (rope.beta_fast, rope.beta_slow) == (16.0, 2.0)
    assert rope.attention_factor == pytest.approx(0.5 * (0.1 * math.log(4) + 1))


def test_gguf_s_old_key_and_a_factor_without_a_type_are_linear() -> None:
    for key in ("rope.scale_linear", "rope.scaling.factor"):
        assert read_gguf(gguf(changes={key: 4.0})).rope == RopeSpec(5e5, "linear", 4.0)
        assert read_gguf(gguf(changes={key: 1.0})).rope == RopeSpec(5e5)
        assert read_gguf(gguf(changes={key: 0.0})).rope == RopeSpec(5e5)
        assert read_gguf(gguf(changes={key: 4.0, "rope.scaling.type": "none"})).rope == RopeSpec(5e5)
    both = {"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}
    assert read_gguf(gguf(changes=both)).rope == RopeSpec(5e5, "linear", 4.0)


def test_gguf_ends_are_found_by_their_spelling_where_they_are_control_tokens() -> None:
    tokens, types = ["a", "</s>", "<|im_end|>", "<|eot_id|>", "<|other|>"], [1, 1, 3, 3, 3]
    metadata = {**gguf(), "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert read_gguf(metadata).eos_token_ids == (319, 2, 3)


def test_gguf_frequency_factors_divide_the_frequencies() -> None:
    factors = tuple(float(n) for n in range(1, 9))
    rope = read_gguf(gguf(), frequency_factors=factors).rope
    assert (rope.scaling, rope.frequency_factors) == ("factors", factors)
    plain = 5e5 ** -(np.arange(8) / 8)
    np.testing.assert_allclose(inverse_frequencies(rope, 16), plain / np.arange(1, 9), rtol=1e-6)


@pytest.mark.parametrize(
    ("metadata", "factors", "error", "message"),
    [
        ({}, (), UnsupportedError, "architecture None"),
        (gguf("gemma"), (), UnsupportedError, "'gemma' is not supported; supported: deepseek_v2"),
        (gguf(changes={"embedding_length": ...}), (), CheckpointError, "embedding_length is missing"),
        (gguf(changes={"attention.head_count": [4, 4, 2]}), (), CheckpointError, r"head_count is \[4, 4, 2\]"),
        (gguf(changes={"attention.layer_norm_rms_epsilon": ...}), (), CheckpointError, "epsilon is missing"),
        (gguf(changes={"rope.dimension_count": 8}), (), UnsupportedError, "rope.dimension_count 8"),
        (gguf(changes={"attention.value_length": 8}), (), UnsupportedError, "attention.value_length 8"),
        (gguf(changes={"expert_count": 8}), (), UnsupportedError, "expert_count 8"),
        (gguf(changes={"attention.causal": False}), (), UnsupportedError, "attention.causal False"),
        (gguf(changes={"attention.sliding_window": 16}), (), UnsupportedError, "attention.sliding_window 16"),
        (gguf(changes={"attention.scale": 0.5}), (), UnsupportedError, "attention.scale 0.5: only 1/√16"),
        (gguf(changes={"final_logit_softcapping": 30.0}), (), UnsupportedError, "final_logit_softcapping 30.0"),
        (gguf(changes={"rope.scaling.factor": 2.0}), (2.0,) * 8, UnsupportedError, "both is not supported"),
        (gguf(changes={"rope.scaling.type": "longrope"}), (), UnsupportedError, "longrope.*none, linear, yarn"),
        (gguf(changes={"rope.scaling.type": "linear"}), (), CheckpointError, "rope.scaling.factor is missing"),
        (gguf(changes={"rope.scaling.attn_factor": 0.5}), (), UnsupportedError, "attn_factor 0.5 without yarn"),
        (
            gguf(changes={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 0.5}),
            (),
            UnsupportedError,
            "attn_factor 0.5 without yarn",
        ),
        (gguf(changes={"rope.scaling.yarn_ext_factor": 1.0}), (), UnsupportedError, "yarn_ext_factor 1: only 0"),
        (gguf(changes={"attention.sliding_window": [8, 8, 8]}), (), CheckpointError, r"sliding_window is \[8, 8, 8\]"),
        ({**gguf(), "tokenizer.ggml.eot_token_id": 9999}, (), CheckpointError, "eot_token_id is 9999, outside"),
        ({**gguf(), "tokenizer.ggml.eom_token_id": -1}, (), CheckpointError, "eom_token_id is -1, outside"),
        (gguf(changes={"block_count": 2**31}), (), CheckpointError, "block_count is"),
        (gguf(), (1.0,) * 7, CheckpointError, "7 factors, head_dim 16 needs 8"),
        (gguf(), (1.0,) * 7 + (0.0,), CheckpointError, "holds 0.0"),
        (gguf(), (1.0,) * 7 + (math.nan,), CheckpointError, "holds nan"),
    ],
)
def test_gguf_metadata_at_fault(
    metadata: dict[str, Any], factors: tuple[float, ...], error: type[BuildError], message: str
) -> None:
    with pytest.raises(error, match=message):
        read_gguf(metadata, frequency_factors=factors)


REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, parameters) for kind, (parameters, _) in ROPES.items() if kind != "default"},
    "yarn-narrow": ("yarn", {**YARN, "beta_fast": 2.0, "beta_slow": 1.9}),
    "yarn-mscale": ("yarn", {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}),
    "yarn-attention-factor": ("yarn", {**YARN, "attention_factor": 0.9}),
    "yarn-untruncated": ("yarn", {**YARN, "truncate": False}),
    "yarn-deepseek": ("yarn", {"factor": None, "original_max_position_embeddings": 64}),
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", REFERENCES)
def test_rope_tables_are_those_of_transformers(name: str, head_dim: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, parameters = REFERENCES[name]
    values = config(head_dim=head_dim, **roped("transformers 5", kind, parameters))
    rope = from_hf(values).rope
    reference = transformers.LlamaConfig(**{k: v for k, v in values.items() if k != "model_type"})
    cos, sin = rope_tables(rope, head_dim, 512)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == sin.shape == (512, head_dim // 2)
    for position in (0, 1, 63, 255, 256, 511):
        # Dynamic scaling depends on the length so far, and on nothing below the trained one.
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](reference, torch.device("cpu"), seq_len=max(position + 1, 256))
        angles = position * frequencies.numpy()
        np.testing.assert_allclose(cos[position], np.cos(angles) * factor, atol=2e-4)
        np.testing.assert_allclose(sin[position], np.sin(angles) * factor, atol=2e-4)


def test_default_rope_is_the_formula() -> None:
    cos, sin = rope_tables(RopeSpec(10000.0), 8, 100)
    angles = np.arange(100)[:, None] * 10000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)


def test_specs_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(SpecError, match="'yarn' needs original_max_position_embeddings"):
        RopeSpec(scaling="yarn", factor=2.0)
    with pytest.raises(SpecError, match="belong together"):
        RopeSpec(scaling="factors")
    with pytest.raises(SpecError, match="belong together"):
        RopeSpec(frequency_factors=(1.0,))
