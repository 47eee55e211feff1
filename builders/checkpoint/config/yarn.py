"""What yarn multiplies cos and sin by, from a checkpoint's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from deepseek_triton.builders.checkpoint.config.values import number


def mscale(factor: float, weight: float) -> float:
    """yarn's magnitude for a context stretched by `factor`."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """The attention factor of the rope `parameters`; factor: by how much the context is stretched."""
    if parameters.get("attention_factor") is not None:
        return number(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(factor, number(parameters, "mscale")) / mscale(factor, number(parameters, "mscale_all_dim"))
    # R1-0528-Qwen3-8B carries attn_factor = 1 / mscale(1): a multiplier on top, as vLLM reads it. transformers ignores
    # the key and comes out 1.14 times too high in cos and sin.
    return mscale(factor, 1.0) * number(parameters, "attn_factor", 1.0)
