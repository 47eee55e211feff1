"""SamplingParams: the validated sampling parameters of one request.

The defaults are vLLM's, which change nothing, except that of the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deepseek_triton.ensemble.sampling.errors import SamplingError

MIN_TEMPERATURE = 1e-5  # below it decoding is greedy: float32 would overflow
MAX_LOG_PROBS = 20  # OpenAI's limit
MAX_RETURN_SEQUENCES = 64
MAX_SEED = 2**64 - 1  # the seed tensor is UINT64
MAX_INT32 = 2**31 - 1
MAX_FLOAT32 = float(np.finfo(np.float32).max)
NO_END_ID = -1  # the value of end_id that disables end tokens


class Range(NamedTuple):
    """The allowed values `low` … `high` of a field, and the rule in words for the error message."""

    low: float
    high: float
    rule: str
    excludes_low: bool = False

    def holds(self, value: float) -> bool:
        """Return whether `value` is in the range; NaN never is."""
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
    """The sampling parameters of one request.

    max_tokens: maximum number of generated tokens; None: up to the end of the context.
    min_tokens: minimum number of generated tokens before an end token.
    temperature: 0 is greedy; None: 1 if top_k, top_p or min_p is given, else 0.
    top_k: keep the k likeliest tokens; 0: all.
    top_p: of these, keep the fewest likeliest whose probabilities sum to at least top_p; 1: all.
    min_p: of these, keep those whose probability is at least min_p times that of the likeliest; 0: all.
    seed: the same seed gives the same tokens; None: a random seed.
    repetition_penalty: divides the positive and multiplies the negative logits of tokens in prompt and output.
    presence_penalty: is subtracted from the logits of tokens in the output.
    frequency_penalty: is subtracted from the logits of tokens in the output, once per occurrence.
    end_id: replaces the model's end tokens; -1: no end token.
    num_log_probs: number of likeliest tokens reported with their log probabilities, beside the chosen token; None: no
        log probabilities.
    num_return_sequences: number of sequences sampled for the prompt. Each has its own seed; the first uses `seed`.
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
