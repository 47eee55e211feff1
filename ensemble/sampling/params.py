"""SamplingParams: what one request asks for, validated once.

Absent fields have the values that change nothing: vLLM's defaults, but for the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deepseek_triton.ensemble.sampling.errors import SamplingError

MIN_TEMPERATURE = 1e-5  # below it float32 would overflow, and only the likeliest token is left anyway
MAX_LOG_PROBS = 20  # OpenAI's limit
MAX_RETURN_SEQUENCES = 64
MAX_SEED = 2**64 - 1  # the seed tensor is UINT64
MAX_INT32 = 2**31 - 1
MAX_FLOAT32 = float(np.finfo(np.float32).max)
NO_END_ID = -1  # the value of end_id that lets nothing but the length end a text


class Range(NamedTuple):
    """The values `low` … `high` of a field, without `low` where it is excluded, and the rule in words."""

    low: float
    high: float
    rule: str
    excludes_low: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is in the range; NaN is in none."""
        return self.low <= value <= self.high and not (self.excludes_low and value == self.low)


INTEGERS = {
    "max_tokens": Range(1, MAX_INT32, "must be at least 1"),
    "min_tokens": Range(0, MAX_INT32, "must be at least 0"),
    "top_k": Range(0, MAX_INT32, "must be at least 1, or 0 for all tokens"),
    "seed": Range(0, MAX_SEED, "must be at least 0 and below 2**64"),
    "end_id": Range(NO_END_ID, MAX_INT32, "must be a token id, or -1 for none"),
    "num_log_probs": Range(0, MAX_LOG_PROBS, f"must be 0 to {MAX_LOG_PROBS}"),
    "num_return_sequences": Range(1, MAX_RETURN_SEQUENCES, f"must be 1 to {MAX_RETURN_SEQUENCES}"),
}
FLOATS = {
    "temperature": Range(0, MAX_FLOAT32, "must be a finite number of at least 0"),
    "top_p": Range(0, 1, "must be above 0 and at most 1", excludes_low=True),
    "min_p": Range(0, 1, "must be 0 to 1"),
    "repetition_penalty": Range(0, MAX_FLOAT32, "must be a finite number above 0", excludes_low=True),
    "presence_penalty": Range(-MAX_FLOAT32, MAX_FLOAT32, "must be a finite number"),
    "frequency_penalty": Range(-MAX_FLOAT32, MAX_FLOAT32, "must be a finite number"),
}


@dataclass(frozen=True)
class SamplingParams:
    """One request's choices.

    max_tokens: at most so many new tokens; None: up to the context's end.
    min_tokens: no end token before so many new ones.
    temperature: 0 takes the likeliest token; None: 1 if top_k, top_p or min_p is given, else 0.
    top_k: sample among the k likeliest; 0: all.
    top_p: of these, among the likeliest that together hold this probability; 1: all.
    min_p: of these, among those at least so probable as this times the likeliest; 0: all.
    seed: the same seed gives the same tokens; None: a random one.
    repetition_penalty: divides the positive logits of the tokens of prompt and output and multiplies the negative.
    presence_penalty: is subtracted from the logits of the output's tokens.
    frequency_penalty: the same, times how often each has come.
    end_id: replaces the model's end tokens; -1: the text has none.
    num_log_probs: how many likeliest tokens to report beside the chosen one, with their log probabilities; None: report
        none at all.
    num_return_sequences: samples of the one prompt; each has a seed of its own, the first that of a single one.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    end_id: int | None = None
    num_log_probs: int | None = None
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        for field, allowed in (INTEGERS | FLOATS).items():
            value = getattr(self, field)
            if value is not None and not allowed.holds(value):
                raise SamplingError(f"{field} is {value}, {allowed.rule}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens is {self.min_tokens}, must be at most max_tokens, {self.max_tokens}")
        if self.num_return_sequences > 1 and self.is_greedy:
            raise SamplingError(
                f"num_return_sequences is {self.num_return_sequences}, but the likeliest text is always the same; "
                "give a temperature above 0"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        if self.temperature is None:
            return not self.top_k and self.top_p == 1.0 and not self.min_p
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    @property
    def effective_temperature(self) -> float:
        """The temperature with its default resolved; 0 where decoding is greedy."""
        if self.is_greedy:
            return 0.0
        return 1.0 if self.temperature is None else float(self.temperature)

    @property
    def has_penalties(self) -> bool:
        """Whether any of the three penalties changes anything."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def effective_end_ids(self, model_end_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end this request's text, of a model whose own are `model_end_ids`."""
        if self.end_id is None:
            return model_end_ids
        return frozenset() if self.end_id == NO_END_ID else frozenset({self.end_id})
