"""Chooses a sequence's next token: by device sampling in the runner, or from logits on the host.

Sequences with a guide, bad words, penalties or a forced token are sampled on the host; all others on the device. This
module knows neither slots nor clients.
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


def device_sampling(sequence: TokenSequence) -> DeviceSampling | None:
    """Return the parameters to sample the token after the awaited ones on the device; None: the host must choose it.

    The parameters hold whatever the awaited tokens turn out to be.
    """
    num_awaited = sequence.num_awaited
    if sequence.bad_words is not None or (sequence.guide is not None and (num_awaited or sequence.is_guided)):
        return None
    if sequence.thinking is not None and sequence.thinking.may_force(num_awaited):
        return None
    return sequence.sampler.draw(num_awaited)


def accept_sampled(sequence: TokenSequence, token: int, log_prob: float) -> Outcome:
    """Push the token that the runner sampled to the sequence's sampler."""
    if not math.isfinite(log_prob):
        return SamplingError.not_finite()
    sequence.sampler.push(token)
    return Sampled(token, log_prob)


def choose_all(sequences: Sequence[TokenSequence], logits: Sequence[Logits]) -> list[Outcome]:
    """Choose each sequence's next token from its row of logits [vocab_size]; an error affects its sequence only."""
    masks = _masks(sequences, logits)
    return [
        mask if isinstance(mask, GuideError) else _choose(sequence, row, mask)
        for sequence, row, mask in zip(sequences, logits, masks, strict=True)
    ]


def _masks(
    sequences: Sequence[TokenSequence], logits: Sequence[Logits]
) -> list[NDArray[np.uint32] | GuideError | None]:
    """Return the mask of each sequence's guide, computed in one call; None without a guide."""
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
    except Exception as error:  # a SamplingError or an unexpected error; either ends this sequence only
        return error
