"""What the experts of a layer do on a text: how much each adds to the hidden state, and by which channels.

The score of an expert is that of REAP (router-weighted expert activation pruning, arXiv 2510.13999): the mean, over the
tokens that chose it, of the router's weight times the norm of its output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.decoder.moe import BIAS, ROUTER, MixtureOfExperts, expert_modules
from deepseek_triton.ensemble.decoder.options import ExpertOptions
from deepseek_triton.ensemble.decoder.spec import layer_prefix

Float32 = NDArray[np.float32]
Read = Callable[[str], NDArray[Any]]


class ExpertStatistics:
    """Running sums of one layer. read: a tensor by its whole name."""

    def __init__(self, part: MixtureOfExperts, layer: int, read: Read) -> None:
        self._part, self._prefix, self._read = part, layer_prefix(layer), read
        count, inner = part.options.num_experts, part.options.intermediate_size
        self._tokens = np.zeros(count)
        self._added = np.zeros(count)
        self._squares = np.zeros((count, inner))

    def add(self, normed: Float32) -> None:
        """normed [n, hidden_size]: what the router and the experts read."""
        options, read, prefix = self._part.options, self._read, self._prefix
        bias = read(prefix + BIAS) if options.choice == "group_top2" else None
        weights, chosen = route(options, normed @ _float(read(prefix + ROUTER)).T, bias)
        for expert in np.unique(chosen):
            rows, places = np.nonzero(chosen == expert)
            gate, up, down = (_float(read(f"{prefix}{name}.weight")) for name in expert_modules(int(expert)))
            own = weights[rows, places][:, None]
            product = gated(normed[rows], gate, up)
            self._tokens[expert] += len(rows)
            self._added[expert] += float(np.sum(own[:, 0] * np.linalg.norm(product @ down.T, axis=1)))
            self._squares[expert] += np.sum(np.square(own * product, dtype=np.float64), axis=0)

    def scores(self) -> NDArray[np.float64]:
        """REAP's score of each expert; 0 for one that no token chose."""
        scores: NDArray[np.float64] = self._added / np.maximum(self._tokens, 1)
        return scores

    def squares(self, expert: int) -> NDArray[np.float64]:
        """The sum of squares of each inner channel of an expert, times the router's weights."""
        squares: NDArray[np.float64] = self._squares[expert]
        return squares


def route(options: ExpertOptions, logits: Float32, bias: NDArray[Any] | None) -> tuple[Float32, NDArray[np.int64]]:
    """logits [n, num_experts] → the weights and numbers of each token's experts, [n, num_experts_per_tok] each.

    bias: [num_experts], added to the scores for the choice alone.
    """
    if options.scores == "softmax":
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = exponentials / exponentials.sum(axis=1, keepdims=True)
    else:
        scores = 0.5 + 0.5 * np.tanh(0.5 * logits)
    ranked = scores if bias is None else scores + _float(bias)
    if options.choice != "greedy":
        grouped = ranked.reshape(len(ranked), options.num_groups, -1)
        top = 1 if options.choice == "group_maximum" else 2
        best = np.sort(grouped, axis=2)[:, :, -top:].sum(axis=2)
        allowed = np.argsort(-best, axis=1, kind="stable")[:, : options.topk_group]
        is_allowed = np.zeros(best.shape, bool)
        np.put_along_axis(is_allowed, allowed, True, axis=1)
        excluded = 0.0 if options.choice == "group_maximum" else -np.inf
        ranked = np.where(is_allowed[:, :, None], grouped, excluded).reshape(ranked.shape)
    chosen = np.argsort(-ranked, axis=1, kind="stable")[:, : options.num_experts_per_tok]
    weights = np.take_along_axis(scores, chosen, axis=1)
    if options.is_normalised:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return (weights * options.scale).astype(np.float32), chosen.astype(np.int64)


def gated(values: Float32, gate: Float32, up: Float32) -> Float32:
    """silu(gate(x)) * up(x): [n, inner]."""
    product = values @ gate.T
    product *= 0.5 + 0.5 * np.tanh(0.5 * product)
    product *= values @ up.T
    return product


def _float(array: NDArray[Any]) -> Float32:
    return np.asarray(array, np.float32)
