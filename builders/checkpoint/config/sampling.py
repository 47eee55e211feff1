"""The sampling options that a checkpoint proposes: what holds where a request leaves them out, as in vLLM.

Sources: Hugging Face's `generation_config.json`, and `general.sampling.*` of a GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek_triton.builders.checkpoint.config.known_keys import (
    GENERATION_KEYS,
    UNSERVED_DECODING,
    describe_unknown,
)
from deepseek_triton.builders.checkpoint.config.values import flag
from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.ensemble.protocol.request_options import RANGES

GENERATION = "generation_config.json"
# Key of the file → the request option.
HF_OPTIONS = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
GGUF_OPTIONS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
ALL_TOKENS = (-1, 0)  # top_k, to vLLM and to llama.cpp


def hf_sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """Request option → what holds where a request doesn't say it.

    `do_sample` false: the likeliest token is taken, whatever the other keys say; true without a temperature: 1.

    Raises:
        CheckpointError: a value that no request may have.
    """
    defaults = _options(generation, HF_OPTIONS)
    if generation.get("do_sample") is None:
        return defaults
    if not flag(generation, "do_sample"):
        return {name: value for name, value in defaults.items() if name == "repetition_penalty"}
    return {"temperature": 1.0, **defaults}


def gguf_sampling(metadata: Mapping[str, Any]) -> dict[str, float]:
    """As `hf_sampling`, of a GGUF's metadata."""
    return _options(metadata, GGUF_OPTIONS)


def unknown_generation_keys(generation: Mapping[str, Any]) -> tuple[str, ...]:
    """The warnings about keys of `generation_config.json` that are not known, or ask for what no option here does."""
    unknown = [key for key in GENERATION_KEYS.unknown_keys(generation) if key not in UNSERVED_DECODING]
    unserved = [
        f"{key} {generation[key]!r}"
        for key, neutral in UNSERVED_DECODING.items()
        if generation.get(key) is not None and generation[key] not in neutral
    ]
    asked = f"warning: {GENERATION} asks for what is not served and has no effect: {', '.join(unserved)}"
    return (*describe_unknown(GENERATION, unknown), *((asked,) if unserved else ()))


def _options(values: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, name in options.items():
        value = values.get(key)
        if value is None or (name == "top_k" and value in ALL_TOKENS):
            continue
        kinds = (int,) if RANGES[name].is_whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not RANGES[name].holds(value):
            raise CheckpointError(f"{key} is {value!r}, must be {RANGES[name].rule}")
        found[name] = value
    return found
