"""The keys that `quantization_config` may have: those of the methods that are read, and of what stands inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_triton.builders.checkpoint.config.known_keys import describe_unknown, words

# What one tool or another writes, whatever the method.
_ANY = words("quant_method ignore ignored_layers modules_to_not_convert exclude_modules kv_cache_scheme dequantize")
_ARGUMENTS = words(
    "num_bits type symmetric strategy group_size block_structure dynamic actorder observer observer_kwargs scale_dtype "
    "zp_dtype"
)
# Place in quantization_config → the keys there. A name that is "*" stands for any.
KNOWN: dict[tuple[str, ...], frozenset[str]] = {
    (): _ANY
    | words(
        "format quantization_status config_groups global_compression_ratio sparsity_config transform_config version "
        "run_compressed "  # compressed-tensors
        "activation_scheme fmt scale_fmt weight_block_size "  # transformers, AutoFP8, DeepSeek
        "quant_algo kv_cache_quant_algo producer group_size"  # ModelOpt
    ),
    ("config_groups", "*"): words("targets format weights input_activations output_activations"),
    ("config_groups", "*", "weights"): _ARGUMENTS,
    ("config_groups", "*", "input_activations"): _ARGUMENTS,
}


def unknown_scheme_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The warning about keys of a config.json's `quantization_config` that nothing here knows; none without such."""
    values = config.get("quantization_config") or config.get("compression_config") or {}
    found = [
        ".".join(("quantization_config", *place, key))
        for pattern, known in KNOWN.items()
        for place, holder in _holders(values, pattern)
        for key, value in holder.items()
        if value is not None and key not in known
    ]
    return describe_unknown("config.json", found)


def _holders(values: object, pattern: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The objects inside `values` whose place fits `pattern`, each with its place."""
    if not isinstance(values, Mapping):
        return
    if not pattern:
        yield (), values
        return
    for name in values if pattern[0] == "*" else pattern[:1]:
        for place, holder in _holders(values.get(name), pattern[1:]):
            yield (name, *place), holder
