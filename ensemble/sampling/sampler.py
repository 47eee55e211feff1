"""The sampler of one sequence, which chooses a token from a row of logits.

The order of the steps is vLLM's and Hugging Face's: the guide's mask, penalties, min_tokens (bans end tokens),
temperature, top_k, top_p, min_p, sampling. Log probabilities are computed from the model's logits before these
steps, as in vLLM and TensorRT-LLM by default, so that of a chosen token is always finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, Logits
from deepseek_triton.ensemble.sampling.candidates import candidates, largest, sample_index
from deepseek_triton.ensemble.sampling.errors import SamplingError
from deepseek_triton.ensemble.sampling.params import SamplingParams
from deepseek_triton.ensemble.sampling.penalties import Penalties
from deepseek_triton.ensemble.sampling.seeds import CounterRandom, sequence_seed

# If a TokenRule rejects the sampled token, the sampler samples again, up to MAX_RETRIES times. Then it checks the
# MAX_CHECKED likeliest tokens, so that a rule that rejects nearly all tokens can't stall the engine.
MAX_RETRIES = 8
MAX_CHECKED = 1024


class Sampled(NamedTuple):
    """A chosen token. If requested: its log probability, and the likeliest tokens as (id, log probability)."""

    token: int
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenRule(Protocol):
    """A rule that may reject a sampled token, such as BadWords."""

    def is_allowed(self, token: int) -> bool:
        """Return whether `token` may come next."""

    def push(self, token: int) -> None:
        """Append the token that was chosen."""


class Sampler:
    """Chooses one sequence's tokens and keeps the sequence's sampling state.

    Args:
        params: the request's parameters.
        prompt_ids: the prompt, for the repetition penalty.
        end_ids: the model's end tokens; the request's end_id replaces them.
        index: index of the sequence among the request's num_return_sequences.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int] = (),
        end_ids: frozenset[int] = frozenset(),
        index: int = 0,
    ) -> None:
        self.end_ids = params.effective_end_ids(end_ids)
        self.num_generated = 0
        self._params = params
        self._temperature = np.float32(params.effective_temperature)
        self._seed = 0 if params.is_greedy else sequence_seed(params.seed, index)
        self._random = None if params.is_greedy else CounterRandom(self._seed)
        self._penalties = Penalties(params, prompt_ids) if params.has_penalties else None

    def sample(
        self,
        logits: Logits,
        mask: NDArray[np.uint32] | None = None,
        is_allowed: Callable[[int], bool] | None = None,
    ) -> Sampled:
        """Choose the next token from `logits` [vocab_size], which aren't modified, and push it.

        Args:
            mask: bit i % 32 of word i // 32 says whether token i is allowed; tokens past its end are not.
            is_allowed: is called for each candidate except end tokens, and must have no side effects.

        Raises:
            SamplingError: the logits hold NaN or infinity, or no token is allowed.
        """
        best = int(logits.argmax())  # argmax returns the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise SamplingError.not_finite()
        row = self._processed(logits, mask)
        if row is not logits:
            best = int(row.argmax())
        token = self._pick(row, best, is_allowed)
        self.push(token)
        if self._params.num_log_probs is None:
            return Sampled(token)
        return _with_log_probs(logits, token, self._params.num_log_probs)

    def force(self, token: int, logits: Logits) -> Sampled:
        """Choose `token` regardless of `logits` [vocab_size], which give its log probability, and push it."""
        self.push(token)
        if self._params.num_log_probs is None:
            return Sampled(token)
        return _with_log_probs(logits, token, self._params.num_log_probs)

    def push(self, token: int) -> None:
        """Count a token that this sampler didn't choose: one sampled by the runner, or an earlier one."""
        self.num_generated += 1
        if self._penalties is not None:
            self._penalties.push(token)

    def device_sampling(self, num_awaited: int = 0) -> DeviceSampling | None:
        """Return the parameters with which a runner can sample the next token; None if the host must sample it.

        The runner returns the token's log probability but none of other tokens; the caller must push the token. The
        token's position is after the `num_awaited` tokens that aren't pushed yet.
        """
        step = self.num_generated + num_awaited
        if self._penalties is not None or self._bans_end(step) or self._params.num_log_probs:
            return None
        params = self._params
        return DeviceSampling(
            temperature=params.effective_temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=self._seed,
            step=step,
        )

    def _bans_end(self, step: int) -> bool:
        return step < self._params.min_tokens and bool(self.end_ids)

    def _processed(self, logits: Logits, mask: NDArray[np.uint32] | None) -> Logits:
        """Apply mask, penalties and min_tokens to a copy of `logits`; returns `logits` itself if nothing applies."""
        if mask is None and self._penalties is None and not self._bans_end(self.num_generated):
            return logits
        row = logits.copy()
        if mask is not None:
            bits = np.unpackbits(mask.view(np.uint8), count=len(row), bitorder="little")  # zeros past the mask's end
            np.copyto(row, -np.inf, where=bits == 0)
        if self._penalties is not None:
            self._penalties.apply(row)
        if self._bans_end(self.num_generated):
            row[[token for token in self.end_ids if token < len(row)]] = -np.inf
        return row

    def _pick(self, row: Logits, best: int, is_allowed: Callable[[int], bool] | None) -> int:
        """Choose a token of `row` [vocab_size]; `best` is its argmax."""
        if row[best] == -np.inf:
            raise SamplingError.none_allowed()
        if self._random is None:
            token = best if self._may_follow(best, is_allowed) else None
        else:
            ids, weights = self._candidates(row, best)
            token = self._sample_allowed(ids, weights, is_allowed)
        if token is not None:
            return token
        # The rule rejects every candidate that the filters kept: take the likeliest token that it allows.
        for other in largest(row, MAX_CHECKED).tolist():
            if row[other] > -np.inf and self._may_follow(other, is_allowed):
                return int(other)
        raise SamplingError.none_allowed()

    def _candidates(self, row: Logits, best: int) -> tuple[NDArray[np.int64] | None, Logits]:
        """As `candidates`. With top_k, nothing of the vocabulary's length is copied."""
        likeliest = largest(row, self._params.top_k) if self._params.top_k else None
        with np.errstate(over="ignore"):  # penalties may move logits to the limits of float32
            scores = (row if likeliest is None else row[likeliest]) - row[best]
            scores /= self._temperature
            ids, weights = candidates(scores, self._params)
        return ids if likeliest is None else likeliest[ids], weights

    def _sample_allowed(
        self, ids: NDArray[np.int64] | None, weights: Logits, is_allowed: Callable[[int], bool] | None
    ) -> int | None:
        """Sample from the distribution, conditioned on the token being allowed; None if no candidate is."""
        assert self._random is not None
        for attempt in range(1 + MAX_RETRIES):
            index = sample_index(weights, self._random.uniform(self.num_generated, attempt))
            token = index if ids is None else int(ids[index])
            if self._may_follow(token, is_allowed):
                return token
            weights[index] = 0
            if not weights.any():
                return None
        likeliest = largest(weights, MAX_CHECKED)
        tokens = likeliest if ids is None else ids[likeliest]
        for index, token in zip(likeliest.tolist(), tokens.tolist(), strict=True):
            if weights[index] > 0 and not self._may_follow(token, is_allowed):
                weights[index] = 0
        if not weights[likeliest].any():
            return None
        return int(tokens[sample_index(weights[likeliest], self._random.uniform(self.num_generated, 1 + MAX_RETRIES))])

    def _may_follow(self, token: int, is_allowed: Callable[[int], bool] | None) -> bool:
        return is_allowed is None or token in self.end_ids or is_allowed(token)


def choose(sampler: Sampler, rule: TokenRule | None, logits: Logits, mask: NDArray[np.uint32] | None = None) -> Sampled:
    """Choose the next token that `rule` allows, and push it to the sampler and, unless it is an end token, to the rule.

    Raises:
        SamplingError: as `Sampler.sample`.
    """
    if rule is None:
        return sampler.sample(logits, mask)
    sampled = sampler.sample(logits, mask, rule.is_allowed)
    if sampled.token not in sampler.end_ids:
        rule.push(sampled.token)
    return sampled


def _with_log_probs(logits: Logits, token: int, num_top: int) -> Sampled:
    best = logits.max()
    shifted = logits - best
    log_total = float(best) + float(np.log(np.exp(shifted, out=shifted).sum(dtype=np.float64)))
    top = largest(logits, num_top).tolist() if num_top else []
    return Sampled(token, float(logits[token]) - log_total, tuple((i, float(logits[i]) - log_total) for i in top))
