"""Who chooses a sequence's next token: the runner, by a DeviceSampling, or the host, from logits.

A sequence that needs nothing else is sampled where its logits are; one with a guide, bad words, penalties or a forced
token is not. It knows neither slots nor clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, Logits
from deepseek_triton.ensemble.engine.sequence import Sequence as TokenSequence
from deepseek_triton.ensemble.guided import GuideError, fill_masks
from deepseek_triton.ensemble.sampling import Sampled, SamplingError, choose

Outcome = Sampled | Exception


def sampling_of(sequence: TokenSequence) -> DeviceSampling | None:
    """How a runner may choose the token behind those that the sequence awaits, whatever these are; None: it may not."""
    num_awaited = sequence.num_awaited
    if sequence.bad_words is not None or (sequence.guide is not None and (num_awaited or sequence.is_guided)):
        return None
    if sequence.thinking is not None and sequence.thinking.may_force(num_awaited):
        return None
    return sequence.sampler.draw(num_awaited)


def sampled(sequence: TokenSequence, token: int, log_prob: float) -> Outcome:
    """What the runner sampled for the sequence, as its sampler's choice."""
    if not math.isfinite(log_prob):
        return SamplingError.not_finite()
    sequence.sampler.push(token)
    return Sampled(token, log_prob)


def choose_all(sequences: Sequence[TokenSequence], logits: Sequence[Logits]) -> list[Outcome]:
    """The next token of each sequence from its own row of logits [vocab_size]; an error concerns its sequence alone."""
    masks = _masks(sequences, logits)
    return [
        mask if isinstance(mask, GuideError) else _choose(sequence, row, mask)
        for sequence, row, mask in zip(sequences, logits, masks, strict=True)
    ]


def _masks(
    sequences: Sequence[TokenSequence], logits: Sequence[Logits]
) -> list[NDArray[np.uint32] | GuideError | None]:
    """Which tokens each sequence's guide allows, all asked for in one call."""
    masks: list[NDArray[np.uint32] | GuideError | None] = [None] * len(sequences)
    guided = [(i, s.guide) for i, s in enumerate(sequences) if s.guide is not None and s.is_guided]
    if guided:
        words = np.empty((len(guided), -(-len(logits[0]) // 32)), np.uint32)
        errors = fill_masks([guide for _, guide in guided], words)
        for row, (i, _) in enumerate(guided):
            masks[i] = errors.get(row, words[row])
    return masks


def _choose(sequence: TokenSequence, logits: Logits, mask: NDArray[np.uint32] | None) -> Outcome:
    forced = None if sequence.thinking is None else sequence.thinking.forced_token
    try:
        if forced is not None:
            if sequence.bad_words is not None:
                sequence.bad_words.push(forced)
            return sequence.sampler.force(forced, logits)
        return choose(sequence.sampler, sequence.bad_words, logits, mask)
    except Exception as error:  # a SamplingError, or whatever a client's words make of an odd token: this one's alone
        return error
