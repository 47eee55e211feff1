"""adapter_config.json of a LoRA adapter, as peft writes it: ranks and scalings; what changes the method is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.config.values import flag
from deepseek_triton.builders.checkpoint.tensor_checks import naming_file, read_json
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError

FILE_NAME = "adapter_config.json"
MERGE = "merge it with peft's merge_and_unload, and build the result"
READ = (
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "use_dora", "init_lora_weights", "fan_in_fan_out",
)  # fmt: skip
# What they say is in the tensors too, or is of training alone.
CHANGE_NOTHING = (
    "task_type", "inference_mode", "revision", "auto_mapping", "peft_version", "target_modules", "exclude_modules",
    "modules_to_save", "bias", "lora_bias", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_config",
    "megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "enable_lora", "merge_weights",
)  # fmt: skip
# Refused where they are set: key → what it makes of the adapter.
METHODS = {
    "alora_invocation_tokens": "an activated LoRA, which acts on some tokens alone and can't be merged",
    "use_qalora": "a QA-LoRA",
    "layer_replication": "a LoRA on replicated layers",
    "target_parameters": "a LoRA on bare parameters",
    "trainable_token_indices": "a LoRA with trained tokens",
    "arrow_config": "an Arrow router over several adapters",
    "ensure_weight_tying": "a LoRA that ties embedding and head",
}
# Ways to begin training that leave the base as it is; the others train on a changed base.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "normal")


@dataclass(frozen=True)
class LoraConfig:
    """base: what the adapter was trained on, in its own words. patterns: of modules' names → rank, and → alpha."""

    base: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    uses_rslora: bool
    uses_dora: bool

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return int(_matching(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """What the product of the two matrices is multiplied by: alpha / r, or alpha / √r.

        Source: peft's LoraLayer.update_layer.
        """
        rank, alpha = self.rank_of(module), float(_matching(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.uses_rslora else alpha / rank


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the module's name ends with, as peft's get_pattern_key finds it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_lora_config(directory: Path) -> LoraConfig:
    """Read the configuration of the adapter in `directory`.

    Raises:
        CheckpointError: it is missing or damaged.
        UnsupportedError: it is of another method, which the message names.
    """
    file = directory / FILE_NAME
    values = read_json(file)
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{file}: peft_type is {kind!r}, only LORA is supported; {MERGE}")
    for key, value in values.items():
        if value in (None, False, [], {}, "") or key in READ or key in CHANGE_NOTHING:
            continue
        if key in METHODS:
            raise UnsupportedError(f"{file}: {key} is set: {METHODS[key]}; not supported; {MERGE}")
        raise UnsupportedError(f"{file}: {key} is {value!r}, which nothing here knows; {MERGE}")
    if values.get("init_lora_weights", True) not in PLAIN_BEGINNINGS:
        raise UnsupportedError(
            f"{file}: init_lora_weights is {values['init_lora_weights']!r}: the adapter was trained on a changed base; "
            "save it with path_initial_model_for_weight_conversion, or build the merged model"
        )
    with naming_file(file):
        is_rslora, is_dora, is_transposed = (flag(values, key) for key in ("use_rslora", "use_dora", "fan_in_fan_out"))
    if is_transposed:
        raise UnsupportedError(f"{file}: fan_in_fan_out is true, which is of transposed layers; {MERGE}")
    ranks, alphas = (_patterns(file, values, key) for key in ("rank_pattern", "alpha_pattern"))
    if not all(isinstance(rank, int) for rank in ranks.values()):
        raise CheckpointError(f"{file}: rank_pattern must map patterns to whole numbers")
    return LoraConfig(
        base=str(values.get("base_model_name_or_path") or ""),
        rank=int(_positive(file, "r", values.get("r", 8), int)),
        alpha=float(_positive(file, "lora_alpha", values.get("lora_alpha", 8), int | float)),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        uses_rslora=is_rslora,
        uses_dora=is_dora,
    )


def _patterns(file: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{file}: {key} is {patterns!r}, must be a JSON object")
    for pattern, value in patterns.items():
        _positive(file, f"{key}[{pattern!r}]", value, int | float)
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{file}: {key} has {pattern!r}, which is no regular expression") from error
    return patterns


def _positive(file: Path, what: str, value: object, kind: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"{file}: {what} is {value!r}, must be a positive number")
    return value
