"""GGUF metadata → ModelSpec: the one place that knows its naming."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

from deepseek_triton.builders.checkpoint.config.gguf_deepseek import (
    GGUF_NAME,
    architecture_of,
    experts_from_gguf,
    latent_from_gguf,
)
from deepseek_triton.builders.checkpoint.config.known_keys import (
    GGUF_KEYS,
    describe_unknown,
    gguf_architecture_keys,
    words,
)
from deepseek_triton.builders.checkpoint.config.values import (
    checked_spec,
    count,
    number,
    rope_factor,
    supported,
    token_ids,
    whole,
)
from deepseek_triton.builders.checkpoint.config.yarn import yarn_attention_factor
from deepseek_triton.builders.errors import UnsupportedError
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.rope import RopeSpec
from deepseek_triton.ensemble.decoder.spec import ModelSpec

# Control tokens that end a text or a turn by their names, as llama.cpp knows them (`special_eog_ids`).
END_SPELLINGS = words(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> _<EOT> [EOT] "
    "[EOS] <|return|> <|call|> <end_of_utterance> <｜end▁of▁sentence｜> </s>"
)
CONTROL = 3  # the value of tokenizer.ggml.token_type


@checked_spec()
def from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Container[str],
    *,
    vocab_size: int,
    frequency_factors: tuple[float, ...] = (),
) -> ModelSpec:
    """Read GGUF metadata (key → plain value).

    Args:
        metadata: the file's key-value pairs.
        tensor_names: names of the file's tensors; GGUF says by them which biases and which head there are.
        vocab_size: rows of `token_embd.weight`; the metadata key is optional in the format.
        frequency_factors: the tensor `rope_freqs.weight`, where the file has it.
    """
    name = metadata.get("general.architecture")
    values = _own_values(metadata, str(name))
    architecture = architecture_of(values) if name == GGUF_NAME else supported(name)
    GGUF_KEYS.refuse(metadata, "the GGUF")
    gguf_architecture_keys(str(name)).refuse(values, "the GGUF")
    options = ARCHITECTURES[architecture]
    latent = latent_from_gguf(values) if options.is_latent else None
    num_heads, hidden_size = whole(values, "attention.head_count"), whole(values, "embedding_length")
    head_dim = _head_dim(values, hidden_size // num_heads) if latent is None else latent.qk_head_dim
    max_positions = whole(values, "context_length")
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=whole(values, "feed_forward_length"),
        num_layers=whole(values, "block_count"),
        num_heads=num_heads,
        # Newer files of latent attention say 1, what the cache has.
        num_kv_heads=num_heads if latent is not None else whole(values, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=number(values, "attention.layer_norm_rms_epsilon"),
        max_position_embeddings=max_positions,
        tie_word_embeddings="output.weight" not in tensor_names,
        qkv_bias=options.qkv_bias or "blk.0.attn_q.bias" in tensor_names,
        qk_norm=options.qk_norm,
        o_bias="blk.0.attn_output.bias" in tensor_names,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
        eos_token_ids=_end_ids(metadata, vocab_size),
        rope=_rope_from_gguf(values, max_positions, frequency_factors),
        latent=latent,
        experts=experts_from_gguf(values) if options.is_latent else None,
    )
    _refuse_other_attention(values, spec)
    return spec


def unknown_gguf_keys(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The warnings about keys that nothing here reads; `from_gguf` has accepted the metadata."""
    architecture = str(metadata["general.architecture"])
    own = _own_values(metadata, architecture)
    others = {key: value for key, value in metadata.items() if not key.startswith(f"{architecture}.")}
    unknown = [f"{architecture}.{key}" for key in gguf_architecture_keys(architecture).unknown_keys(own)]
    return describe_unknown("the GGUF", [*GGUF_KEYS.unknown_keys(others), *unknown])


def _own_values(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The keys of the architecture, without its name before."""
    prefix = f"{architecture}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _head_dim(values: Mapping[str, Any], default: int) -> int:
    head_dim = whole(values, "attention.key_length", default)
    for key in ("rope.dimension_count", "attention.value_length"):
        if whole(values, key, head_dim) != head_dim:
            raise UnsupportedError(f"the GGUF has {key} {values[key]}, other than a head's {head_dim}: not supported")
    return head_dim


def _end_ids(metadata: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The ids that the file names, and the control tokens that are ends by their spelling."""
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    named = [index for key in keys for index in token_ids([metadata.get(key)], key, vocab_size)]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    spelled: list[int] = []
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = zip(tokens[:vocab_size], types, strict=False)
        spelled = [index for index, pair in enumerate(pairs) if pair[1] == CONTROL and pair[0] in END_SPELLINGS]
    return token_ids([*named, *spelled])


def _refuse_other_attention(values: Mapping[str, Any], spec: ModelSpec) -> None:
    scale = number(values, "attention.scale", 0.0)
    if scale and not math.isclose(scale, spec.head_dim**-0.5, rel_tol=1e-5):
        raise UnsupportedError(f"the GGUF has attention.scale {scale:g}: only 1/√{spec.head_dim} is supported")
    window = count(values, "attention.sliding_window", 0)
    if window and window < spec.max_seq_len:
        raise UnsupportedError(
            f"the GGUF has attention.sliding_window {window}, fewer than the model's {spec.max_seq_len} tokens: "
            "sliding windows are not supported"
        )


def _rope_from_gguf(values: Mapping[str, Any], max_positions: int, frequency_factors: tuple[float, ...]) -> RopeSpec:
    theta = number(values, "rope.freq_base", 10000.0)
    # A factor without a type is linear, as in llama.cpp.
    factor = rope_factor(values)
    kind = values.get("rope.scaling.type", "linear" if factor != 1.0 else "none")
    multiplier = number(values, "rope.scaling.attn_factor", number(values, "rope.scaling.yarn_attn_factor", 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"rope scaling {kind!r} is not supported in GGUF; supported: none, linear, yarn")
    # llama.cpp multiplies cos and sin by the factor, and blends frequencies, whatever the type is.
    if kind != "yarn" and multiplier != 1.0:
        raise UnsupportedError(f"the GGUF has rope.scaling.attn_factor {multiplier:g} without yarn: not supported")
    extrapolation = number(values, "rope.scaling.yarn_ext_factor", -1.0)
    neutral = (-1.0, 1.0) if kind == "yarn" else (-1.0, 0.0)
    if extrapolation not in neutral:
        raise UnsupportedError(
            f"the GGUF has rope.scaling.yarn_ext_factor {extrapolation:g}: only {neutral[1]:g} is supported for rope "
            f"scaling {kind!r}"
        )
    if frequency_factors:
        if kind != "none" and factor != 1.0:
            raise UnsupportedError(f"the GGUF has rope_freqs.weight and rope scaling {kind!r}: both is not supported")
        return RopeSpec(theta, "factors", frequency_factors=frequency_factors)
    if kind == "none":
        return RopeSpec(theta)
    if "rope.scaling.factor" not in values and "rope.scale_linear" not in values:
        factor = number(values, "rope.scaling.factor")  # which says that it is missing
    if kind == "linear":
        return RopeSpec(theta, "linear", factor)
    is_even = bool(values.get("rope.scaling.yarn_log_multiplier"))  # mscale and mscale_all_dim are the same
    return RopeSpec(
        theta, "yarn", factor, whole(values, "rope.scaling.original_context_length", max_positions),
        beta_fast=number(values, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=number(values, "rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=1.0 if is_even else yarn_attention_factor({"attn_factor": multiplier}, factor),
    )  # fmt: skip
