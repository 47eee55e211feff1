"""Sampling of one sequence's next token: the validated parameters and the sampler.

A sampler sees one row of logits at a time; it knows nothing of batches, slots or text.
"""

from __future__ import annotations

from deepseek_triton.ensemble.sampling.errors import SamplingError
from deepseek_triton.ensemble.sampling.params import MAX_LOG_PROBS, MAX_RETURN_SEQUENCES, SamplingParams
from deepseek_triton.ensemble.sampling.sampler import Sampled, Sampler, TokenRule, choose

__all__ = [
    "MAX_LOG_PROBS",
    "MAX_RETURN_SEQUENCES",
    "Sampled",
    "Sampler",
    "SamplingError",
    "SamplingParams",
    "TokenRule",
    "choose",
]
