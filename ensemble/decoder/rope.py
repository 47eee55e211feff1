"""Rotary position embedding: base frequency, and how it is stretched past the trained length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deepseek_triton.ensemble.decoder.errors import SpecError

RopeScaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "factors"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: base frequency and how it is stretched past the trained length.

    `factor` divides frequencies (linear, llama3, yarn) or grows the base (dynamic); `original_max_position_embeddings`
    is the length the model was first trained with, in tokens. `attention_factor` multiplies cos and sin
    (yarn). `frequency_factors`, one divisor for each pair of channels, is how GGUF files carry llama3's scaling.
    Formulas: transformers' `modeling_rope_utils.py`.
    """

    theta: float = 10000.0
    scaling: RopeScaling = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    frequency_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 < self.theta < math.inf:
            raise SpecError(f"rope theta is {self.theta}, must be a number above 1")
        if not 1 <= self.factor < math.inf:
            raise SpecError(f"rope scaling factor is {self.factor}, must be a number of at least 1")
        if self.scaling in ("dynamic", "llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise SpecError(f"rope scaling {self.scaling!r} needs original_max_position_embeddings")
        if (self.scaling == "factors") != bool(self.frequency_factors):
            raise SpecError("rope frequency factors and scaling 'factors' belong together")
        if self.scaling == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise SpecError(
                f"low_freq_factor is {self.low_freq_factor}, must lie between 0 and high_freq_factor "
                f"{self.high_freq_factor}"
            )
        if self.scaling == "yarn" and not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise SpecError(f"beta_slow is {self.beta_slow}, must lie between 0 and beta_fast {self.beta_fast}")
        if not 0 < self.attention_factor < math.inf:
            raise SpecError(f"attention_factor is {self.attention_factor}, must be a number above 0")
        for number in self.frequency_factors:
            if not 0 < number < math.inf:
                raise SpecError(f"rope_freqs.weight holds {number}, must hold numbers above 0")
