"""Chooses a sequence's next token: by device sampling in the runner, or from logits on the host.

Sequences with a guide, bad words, penalties or a forced token are sampled on the host; all others on the device. The
mask of a guide is computed on another thread. This module knows neither slots nor clients.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, Logits
from deepseek_triton.ensemble.engine.sequence import Sequence as TokenSequence
from deepseek_triton.ensemble.guided.errors import GuideError
from deepseek_triton.ensemble.sampling import Sampled, SamplingError, choose
from deepseek_triton.ensemble.text.errors import without_frames

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
    return sequence.sampler.device_sampling(num_awaited)


def accept_sampled(sequence: TokenSequence, token: int, log_prob: float) -> Outcome:
    """Push the token that the runner sampled to the sequence's sampler."""
    if not math.isfinite(log_prob):
        return SamplingError.not_finite()
    sequence.sampler.push(token)
    return Sampled(token, log_prob)


def choose_on_host(sequence: TokenSequence, logits: Logits, wait_s: float = 0.0) -> Outcome | None:
    """Choose the sequence's next token from `logits` [vocab_size]; None: its guide's mask isn't computed yet.

    wait_s: how long the mask may be waited for.
    """
    mask = None
    if sequence.guide is not None and sequence.is_guided:
        try:
            mask = sequence.guide.mask(wait_s)
        except GuideError as error:  # ends this sequence only, as an unexpected error does
            return without_frames(error)
        except Exception as error:
            return error
        if mask is None:
            return None
    return _choose(sequence, logits, mask)


def _choose(sequence: TokenSequence, logits: Logits, mask: NDArray[np.uint32] | None) -> Outcome:
    forced = None if sequence.thinking is None else sequence.thinking.forced_token
    try:
        if forced is not None:
            if sequence.bad_words is not None:
                sequence.bad_words.push(forced)
            return sequence.sampler.force(forced, logits)
        return choose(sequence.sampler, sequence.bad_words, logits, mask)
    except SamplingError as error:  # ends this sequence only, as an unexpected error does
        return without_frames(error)
    except Exception as error:
        return error
