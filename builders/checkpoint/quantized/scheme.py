"""`quantization_config` of config.json → how FP8 weights are scaled; every other method is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepseek_triton.builders.checkpoint.quantized.refused import METHODS, refusal
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError

BLOCK = (128, 128)
# Formats of compressed-tensors that store each weight as it is. None: an old file that names none.
PLAIN_FORMATS = (None, "dense", "float-quantized", "naive-quantized", "mixed-precision")
STRATEGIES = (None, "tensor", "channel", "block", "group")
# ModelOpt's quant_algo → does each layer have an input scale?
MODELOPT_ALGORITHMS = {"FP8": True, "FP8_PER_CHANNEL_PER_TOKEN": False, "FP8_PB_WO": False}


@dataclass(frozen=True)
class Fp8Scheme:
    """How FP8 weights are scaled.

    has_plain: weights may have one scale, or one for each row. block: rows and columns that share a scale, where
    weights may have scales for blocks. is_static: each layer has a scale for its input too; else a token's own is
    computed.
    """

    has_plain: bool = True
    block: tuple[int, int] | None = None
    is_static: bool = False


UNNAMED = Fp8Scheme(has_plain=False, block=BLOCK)  # DeepSeek's, of files whose configuration says nothing


def fp8_scheme(config: Mapping[str, Any]) -> Fp8Scheme:
    """Read a config.json; one that doesn't speak of quantised weights gives `UNNAMED`.

    Raises:
        UnsupportedError: the weights are quantised by another method, or with an option that changes what they mean.
        CheckpointError: the configuration is damaged.
    """
    if isinstance(config.get("quantization"), Mapping) and "bits" in config["quantization"]:
        raise refusal("MLX (integers)", "quantization")
    values = config.get("quantization_config") or config.get("compression_config")
    if not values:
        return UNNAMED
    values = _mapping(values, "quantization_config")
    method = values.get("quant_method") or _method(values)
    if method == "sparseml":
        method = "compressed-tensors"
    readers = {"fp8": _hugging_face, "compressed-tensors": _compressed_tensors, "modelopt": _modelopt}
    if isinstance(method, str) and method in readers:
        return readers[method](values)
    place = f"quantization_config has quant_method {method!r}"
    raise refusal(_words(method, values), place)


def _method(values: Mapping[str, Any]) -> str | None:
    """The method of a configuration that doesn't name it."""
    signs = {
        "config_groups": "compressed-tensors", "load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes",
        "quant_algo": "modelopt", "w_bit": "awq", "desc_act": "gptq", "weight_block_size": "fp8",
    }  # fmt: skip
    return next((method for key, method in signs.items() if key in values), None)


def _words(method: object, values: Mapping[str, Any]) -> str:
    name = str(method).replace("_", "-") if str(method).startswith("auto") else str(method)
    if method == "bitsandbytes":
        if values.get("load_in_4bit") or values.get("_load_in_4bit"):
            return f"bitsandbytes {str(values.get('bnb_4bit_quant_type', 'fp4')).upper()} (4 bits)"
        return "bitsandbytes LLM.int8 (8-bit integers)"
    return METHODS.get(name.lower(), f"a method unknown here ({name})")


def _hugging_face(values: Mapping[str, Any]) -> Fp8Scheme:
    """transformers' and AutoFP8's `fp8`, DeepSeek's own checkpoints among them."""
    if (fmt := values.get("fmt", "e4m3")) not in (None, "e4m3", "float8_e4m3fn"):
        raise UnsupportedError(f"quantization_config has fmt {fmt!r}: only e4m3 is supported")
    block = values.get("weight_block_size")
    return Fp8Scheme(
        has_plain=block is None,
        block=None if block is None else _block(block),
        is_static=_is_static(values.get("activation_scheme")),
    )


def _is_static(value: object) -> bool:
    if value not in (None, "dynamic", "static"):
        raise UnsupportedError(f"quantization_config has activation_scheme {value!r}; supported: dynamic, static")
    return value == "static"


def _modelopt(values: Mapping[str, Any]) -> Fp8Scheme:
    algorithm = values.get("quant_algo")
    if algorithm not in MODELOPT_ALGORITHMS:
        what = f"ModelOpt's {algorithm}"
        raise refusal(what, f"quantization_config has quant_algo {algorithm!r}")
    is_block = algorithm == "FP8_PB_WO"
    return Fp8Scheme(not is_block, BLOCK if is_block else None, MODELOPT_ALGORITHMS[algorithm])


def _compressed_tensors(values: Mapping[str, Any]) -> Fp8Scheme:
    by_name = _mapping(values.get("config_groups"), "config_groups")
    if presets := [name for name, group in by_name.items() if isinstance(group, list)]:
        raise UnsupportedError(f"config_groups names the preset {presets[0]!r}: write its arguments out")
    groups = [_mapping(group, "config_groups") for group in by_name.values()]
    for holder in (values, *groups):
        if (name := holder.get("format")) not in PLAIN_FORMATS:
            raise refusal(f"compressed-tensors' {name}", f"quantization_config has format {name!r}")
    sparsity = _mapping(values.get("sparsity_config"), "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise refusal(f"compressed-tensors' {sparsity}", f"sparsity_config has format {sparsity!r}")
    if values.get("transform_config"):
        raise UnsupportedError("quantization_config has a transform_config: rotated weights are not supported")
    blocks: set[tuple[int, int]] = set()
    has_plain, is_static = not groups, False
    for group in groups:
        weights = _mapping(group.get("weights"), "weights")
        inputs = _mapping(group.get("input_activations"), "input_activations")
        if group.get("output_activations"):
            raise UnsupportedError("quantization_config has output_activations: quantised outputs are not supported")
        for what, arguments in (("weights", weights), ("input_activations", inputs)):
            _check_float8(what, arguments)
        if (strategy := weights.get("strategy")) not in STRATEGIES:
            raise UnsupportedError(
                f"quantization_config has weights of strategy {strategy!r}; supported: "
                f"{', '.join(name for name in STRATEGIES if name)}"
            )
        if strategy == "block":
            blocks.add(_block(weights.get("block_structure")))
        elif strategy == "group":
            blocks.add(_block([1, weights.get("group_size")]))
        else:
            has_plain = True
        is_static = is_static or (bool(inputs) and not inputs.get("dynamic"))
    if len(blocks) > 1:
        raise UnsupportedError("quantization_config has groups with different blocks: not supported")
    return Fp8Scheme(has_plain, next(iter(blocks), None), is_static)


def _check_float8(what: str, arguments: Mapping[str, Any]) -> None:
    """Weights or activations of a group: 8-bit floats, or nothing."""
    if not arguments:
        return
    kind, bits = arguments.get("type", "int"), arguments.get("num_bits", 8)
    if (kind, bits) != ("float", 8):
        raise refusal(f"compressed-tensors with {bits}-bit {kind} {what}", f"quantization_config has {what}")
    if arguments.get("symmetric", True) is False:
        raise UnsupportedError(f"quantization_config has asymmetric {what}: not supported")


def _block(value: object) -> tuple[int, int]:
    sides = [n for n in value if type(n) is int and 0 < n < 2**31] if isinstance(value, list | tuple) else []
    if not isinstance(value, list | tuple) or len(value) != 2 or len(sides) != 2:
        raise CheckpointError(f"quantization_config has blocks of {value!r}, must be two positive whole numbers")
    return sides[0], sides[1]


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{key} is {value!r}, must be a JSON object")
    return value
