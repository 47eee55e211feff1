"""The sampler of one sequence: a row of logits in, a token out.

The order is vLLM's and Hugging Face's: guided decoding's mask, penalties, no end token before min_tokens, temperature,
top_k, top_p, min_p, draw. Log probabilities are the model's own, of the logits before all of that, as vLLM and
TensorRT-LLM report them by default: they say what the model thinks, and a chosen token always has a finite one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.runners.base import DeviceSampling, Logits
from deepseek_triton.ensemble.sampling.candidates import candidates, draw_index, largest
from deepseek_triton.ensemble.sampling.errors import SamplingError
from deepseek_triton.ensemble.sampling.params import SamplingParams
from deepseek_triton.ensemble.sampling.penalties import Penalties
from deepseek_triton.ensemble.sampling.seeds import CounterRandom, sequence_seed

# Tokens drawn again, one by one, where a rule refuses them; then the likeliest are all looked at, so that a rule that
# refuses nearly everything can't hold the engine up.
MAX_REDRAWS = 8
MAX_LOOKED_AT = 1024


class Sampled(NamedTuple):
    """A chosen token, and what was asked of log probabilities: its own, and the likeliest tokens' with theirs."""

    token: int
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenRule(Protocol):
    """What may refuse a token that was drawn: BadWords."""

    def is_allowed(self, token: int) -> bool:
        """Whether `token` may come next."""

    def push(self, token: int) -> None:
        """Take the token that came."""


class Sampler:
    """Chooses one sequence's tokens; knows which came before.

    Args:
        params: the request's.
        prompt_ids: the prompt, which the repetition penalty counts.
        end_ids: the model's end tokens; the request's end_id replaces them.
        index: which of the request's num_return_sequences this is.
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
        """Choose the next token from `logits` [vocab_size], which stay as they are, and push it.

        Args:
            mask: bit i % 32 of word i // 32 says whether token i is allowed; tokens past its end are not.
            is_allowed: is asked about each token that would be chosen, end tokens aside; it must not change.

        Raises:
            SamplingError: the logits hold NaN or infinity, or no token is allowed.
        """
        best = int(logits.argmax())  # the first NaN, where there is one
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
        """Take `token`, whatever `logits` [vocab_size] say of it."""
        self.push(token)
        if self._params.num_log_probs is None:
            return Sampled(token)
        return _with_log_probs(logits, token, self._params.num_log_probs)

    def push(self, token: int) -> None:
        """Take a token that came from elsewhere: a runner's draw, or a sequence's past."""
        self.num_generated += 1
        if self._penalties is not None:
            self._penalties.push(token)

    def draw(self, num_awaited: int = 0) -> DeviceSampling | None:
        """How a runner can choose the next token itself; None where it takes more than a DeviceSampling can say.

        The runner then gives the chosen token's log probability, but no others', and the token must be pushed. The
        next token is that behind the `num_awaited` that aren't pushed yet.
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
        """`logits` itself, or a copy where anything changes it."""
        if mask is None and self._penalties is None and not self._bans_end(self.num_generated):
            return logits
        row = logits.copy()
        if mask is not None:
            bits = np.unpackbits(mask.view(np.uint8), count=len(row), bitorder="little")  # 0 past the mask's end
            np.copyto(row, -np.inf, where=bits == 0)
        if self._penalties is not None:
            self._penalties.apply(row)
        if self._bans_end(self.num_generated):
            row[[token for token in self.end_ids if token < len(row)]] = -np.inf
        return row

    def _pick(self, row: Logits, best: int, is_allowed: Callable[[int], bool] | None) -> int:
        """A token of `row`, whose likeliest is `best`."""
        if row[best] == -np.inf:
            raise SamplingError.none_allowed()
        if self._random is None:
            token = best if self._may_follow(best, is_allowed) else None
        else:
            with np.errstate(over="ignore"):  # a penalty may have put tokens as far apart as float32 goes
                scores = row - row[best]
                scores /= self._temperature
                ids, weights = candidates(scores, self._params)
            token = self._draw_allowed(ids, weights, is_allowed)
        if token is not None:
            return token
        # None of those that would be drawn may follow: the likeliest that may.
        for other in largest(row, MAX_LOOKED_AT).tolist():
            if row[other] > -np.inf and self._may_follow(other, is_allowed):
                return int(other)
        raise SamplingError.none_allowed()

    def _draw_allowed(
        self, ids: NDArray[np.int64] | None, weights: Logits, is_allowed: Callable[[int], bool] | None
    ) -> int | None:
        """Draw until a token may follow: the distribution of a draw, given that it may."""
        assert self._random is not None
        for attempt in range(1 + MAX_REDRAWS):
            index = draw_index(weights, self._random.uniform(self.num_generated, attempt))
            token = index if ids is None else int(ids[index])
            if self._may_follow(token, is_allowed):
                return token
            weights[index] = 0
            if not weights.any():
                return None
        likeliest = largest(weights, MAX_LOOKED_AT)
        tokens = likeliest if ids is None else ids[likeliest]
        for index, token in zip(likeliest.tolist(), tokens.tolist(), strict=True):
            if weights[index] > 0 and not self._may_follow(token, is_allowed):
                weights[index] = 0
        if not weights[likeliest].any():
            return None
        return int(tokens[draw_index(weights[likeliest], self._random.uniform(self.num_generated, 1 + MAX_REDRAWS))])

    def _may_follow(self, token: int, is_allowed: Callable[[int], bool] | None) -> bool:
        return is_allowed is None or token in self.end_ids or is_allowed(token)


def choose(sampler: Sampler, rule: TokenRule | None, logits: Logits, mask: NDArray[np.uint32] | None = None) -> Sampled:
    """The next token that `rule` allows; sampler and rule have taken it, the rule no end token: it is no text."""
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
