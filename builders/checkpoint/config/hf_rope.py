"""Rotary embedding of a Hugging Face `config.json` → RopeSpec.

transformers 5 writes `rope_parameters`; earlier releases, and the recipes of model cards, `rope_scaling` beside
`rope_theta`. Where both stand, `rope_scaling` counts, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek_triton.builders.checkpoint.config.known_keys import words
from deepseek_triton.builders.checkpoint.config.values import flag, number, whole
from deepseek_triton.builders.checkpoint.config.yarn import mscale, yarn_attention_factor
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.rope import RopeSpec

DEFAULT_THETA = 10000.0
# rope type → the keys that it reads, beside those of every type.
ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": words(""),
    "linear": words("factor"),
    "dynamic": words("factor"),
    "llama3": words("factor original_max_position_embeddings low_freq_factor high_freq_factor"),
    "yarn": words(
        "factor original_max_position_embeddings beta_fast beta_slow attention_factor attn_factor mscale "
        "mscale_all_dim truncate"
    ),
}
_EVERY_ROPE = words("rope_type type rope_theta partial_rotary_factor")
# Of the types that it doesn't concern: transformers' own files keep it, whatever the type.
_LENGTH = words("original_max_position_embeddings")


def rope_from_hf(config: Mapping[str, Any], max_positions: int) -> RopeSpec:
    """The rotary embedding of `config.json`; max_positions: its max_position_embeddings.

    Raises:
        UnsupportedError: a type that no table of cos and sin here implements.
        CheckpointError: a value that is missing or out of range, or a scaling factor without a type.
    """
    parameters = _parameters(config)
    for where in (config, parameters):
        if number(where, "partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError("config.json has partial_rotary_factor other than 1: not supported")
    theta = _theta(config, parameters)
    kind = _kind(parameters)
    if kind == "default":
        return RopeSpec(theta=theta)
    original = whole(parameters, "original_max_position_embeddings", max_positions)
    original = whole(config, "original_max_position_embeddings", original)
    # DeepSeek's yarn configurations may say the two lengths instead of their ratio.
    factor = number(parameters, "factor", max_positions / original if kind == "yarn" else None)
    if kind == "llama3":
        return RopeSpec(
            theta, "llama3", factor, original,
            low_freq_factor=number(parameters, "low_freq_factor"),
            high_freq_factor=number(parameters, "high_freq_factor"),
        )  # fmt: skip
    if kind == "yarn":
        return RopeSpec(
            theta, "yarn", factor, original,
            beta_fast=number(parameters, "beta_fast", 32.0),
            beta_slow=number(parameters, "beta_slow", 1.0),
            attention_factor=yarn_attention_factor(parameters, factor),
            truncate=flag(parameters, "truncate", default=True),
        )  # fmt: skip
    # Dynamic scaling begins where max_position_embeddings ends, whatever the original length was.
    return RopeSpec(theta, "linear" if kind == "linear" else "dynamic", factor, max_positions)


def softmax_factor(config: Mapping[str, Any]) -> float:
    """What multiplies latent attention's softmax scale: where rope is scaled, the square of mscale(mscale_all_dim).

    Source: transformers' `yarn_apply_mscale` in modeling_deepseek_v3.py.
    """
    parameters = _parameters(config)
    weight = number(parameters, "mscale_all_dim", 0.0)
    if _kind(parameters) == "default" or not weight:
        return 1.0
    return mscale(number(parameters, "factor", 1.0), weight) ** 2


def unused_rope_keys(config: Mapping[str, Any]) -> list[str]:
    """The rope parameters that the type doesn't read, each as `rope_scaling.KEY`."""
    parameters = _parameters(config)
    known = _EVERY_ROPE | _LENGTH | ROPE_KEYS[_kind(parameters)]
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return [f"{name}.{key}" for key, value in parameters.items() if value is not None and key not in known]


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"the rope parameters are {parameters!r}, must be a JSON object")
    if nested := [key for key, value in parameters.items() if isinstance(value, Mapping)]:
        raise UnsupportedError(
            f"config.json has rope parameters for {' and '.join(nested)} apart: supported is one kind for all layers"
        )
    return parameters


def _theta(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> float:
    theta = number(parameters, "rope_theta", number(config, "rope_theta", DEFAULT_THETA))
    replaced = config.get("rope_parameters") if config.get("rope_scaling") else None
    if isinstance(replaced, Mapping) and (other := number(replaced, "rope_theta", theta)) != theta:
        raise CheckpointError(
            f"rope_scaling stands beside rope_parameters, whose rope_theta {other:g} it would replace by {theta:g}: "
            "put the scaling into rope_parameters, or rope_theta into rope_scaling"
        )
    return theta


def _kind(parameters: Mapping[str, Any]) -> str:
    kind: Any = parameters.get("rope_type") or parameters.get("type")
    if kind is None and number(parameters, "factor", 1.0) != 1.0:
        types, factor = ", ".join(ROPE_KEYS), parameters["factor"]
        raise CheckpointError(f"the rope parameters have factor {factor} and no rope_type; say which: {types}")
    kind = kind or "default"
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise UnsupportedError(f"rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}")
    return kind
