"""GGUF metadata → ModelSpec: the one place that knows its naming."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from deepseek_triton.builders.checkpoint.config_values import checked_spec, number, supported, token_ids, whole
from deepseek_triton.builders.checkpoint.yarn import yarn_attention_factor
from deepseek_triton.builders.errors import UnsupportedError
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.rope import RopeSpec
from deepseek_triton.ensemble.decoder.spec import ModelSpec


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
    architecture = supported(metadata.get("general.architecture"))

    values = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    options = ARCHITECTURES[architecture]
    num_heads, hidden_size = whole(values, "attention.head_count"), whole(values, "embedding_length")
    head_dim = whole(values, "attention.key_length", hidden_size // num_heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if whole(values, key, head_dim) != head_dim:
            raise UnsupportedError(f"the GGUF has {key} {values[key]}, other than a head's {head_dim}: not supported")
    max_positions = whole(values, "context_length")
    eos = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=whole(values, "feed_forward_length"),
        num_layers=whole(values, "block_count"),
        num_heads=num_heads,
        num_kv_heads=whole(values, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=number(values, "attention.layer_norm_rms_epsilon"),
        max_position_embeddings=max_positions,
        tie_word_embeddings="output.weight" not in tensor_names,
        qkv_bias=options.qkv_bias or "blk.0.attn_q.bias" in tensor_names,
        qk_norm=options.qk_norm,
        o_bias="blk.0.attn_output.bias" in tensor_names,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
        eos_token_ids=token_ids(eos),
        rope=_rope_from_gguf(values, max_positions, frequency_factors),
    )


def _rope_from_gguf(values: Mapping[str, Any], max_positions: int, frequency_factors: tuple[float, ...]) -> RopeSpec:
    kind = values.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"rope scaling {kind!r} is not supported in GGUF; supported: none, linear, yarn")
    theta = number(values, "rope.freq_base", 10000.0)
    if frequency_factors:
        return RopeSpec(theta, "factors", frequency_factors=frequency_factors)
    if kind == "none":
        return RopeSpec(theta)
    factor = number(values, "rope.scaling.factor")
    if kind == "linear":
        return RopeSpec(theta, "linear", factor)
    return RopeSpec(
        theta, "yarn", factor, whole(values, "rope.scaling.original_context_length", max_positions),
        beta_fast=number(values, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=number(values, "rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=yarn_attention_factor({"attn_factor": values.get("rope.scaling.attn_factor")}, factor),
    )  # fmt: skip
