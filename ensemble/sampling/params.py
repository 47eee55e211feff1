"""SamplingParams: the sampling options of one request, validated once.

Ranges and defaults are those of `ensemble/protocol/request_options.py`. The defaults change nothing; they are vLLM's,
but for the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from deepseek_triton.ensemble.protocol.ranges import MAX_FLOAT32, Range
from deepseek_triton.ensemble.protocol.request_options import (
    MAX_LOG_PROBS,
    MAX_RETURN_SEQUENCES,
    NO_END_ID,
    default_of,
)
from deepseek_triton.ensemble.protocol.request_options import RANGES as OPTION_RANGES
from deepseek_triton.ensemble.sampling.errors import SamplingError

__all__ = ["MAX_FLOAT32", "MAX_LOG_PROBS", "MAX_RETURN_SEQUENCES", "SamplingParams"]

MIN_TEMPERATURE = 1e-5  # below it float32 would overflow, and only the likeliest token would be sampled anyway


@dataclass(frozen=True)
class SamplingParams:
    """The sampling options of one request.

    num_log_probs: how many likeliest tokens to report beside the chosen one, with their log probabilities; None: report
        none at all. Every other field is the request option of that name.
    """

    max_tokens: int | None = None
    min_tokens: int = default_of("min_tokens")
    temperature: float | None = None
    top_k: int = default_of("top_k")
    top_p: float = default_of("top_p")
    min_p: float = default_of("min_p")
    seed: int | None = None
    repetition_penalty: float = default_of("repetition_penalty")
    presence_penalty: float = default_of("presence_penalty")
    frequency_penalty: float = default_of("frequency_penalty")
    end_id: int | None = None
    num_log_probs: int | None = None
    num_return_sequences: int = default_of("num_return_sequences")

    def __post_init__(self) -> None:
        for field, allowed in RANGES.items():
            value = getattr(self, field)
            if value is not None and not allowed.holds(value):
                raise SamplingError(f"{field} is {value}, must be {allowed.broken_rule(value)}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens is {self.min_tokens}, must be at most max_tokens, {self.max_tokens}")
        if self.num_return_sequences > 1 and self.is_greedy:
            raise SamplingError(
                f"num_return_sequences is {self.num_return_sequences}, but greedy sequences would all be equal; "
                "give a temperature above 0"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always chosen."""
        if self.temperature is None:
            return not self.top_k and self.top_p == 1.0 and not self.min_p
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    @property
    def effective_temperature(self) -> float:
        """The temperature with its default resolved; 0 if decoding is greedy."""
        if self.is_greedy:
            return 0.0
        return 1.0 if self.temperature is None else float(self.temperature)

    @property
    def has_penalties(self) -> bool:
        """Whether any of the three penalties differs from its default."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def effective_end_ids(self, model_end_ids: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end this request's text; `model_end_ids` are the model's own."""
        if self.end_id is None:
            return model_end_ids
        return frozenset() if self.end_id == NO_END_ID else frozenset({self.end_id})


RANGES: dict[str, Range] = {
    **{field.name: OPTION_RANGES[field.name] for field in fields(SamplingParams) if field.name in OPTION_RANGES},
    "num_log_probs": OPTION_RANGES["num_top_log_probs"],
}
