"""A mixture of experts in arrays: the router chooses on the host, each chosen expert computes its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.forward.dense_mlp import gated_product
from deepseek_triton.builders.fp8.forward.values import LayerValues
from deepseek_triton.builders.fp8.rounding.arrays import Array
from deepseek_triton.ensemble.decoder.moe import (
    BIAS,
    CHOSEN,
    NORM,
    ROUTER,
    SHARED_DOWN,
    SHARED_GATE,
    SHARED_PRODUCT,
    SHARED_UP,
    MixtureOfExperts,
    expert_modules,
)
from deepseek_triton.ensemble.decoder.options import ExpertOptions

TINY = 1e-20  # added to a sum that divides


def run_experts(values: LayerValues, part: MixtureOfExperts, hidden: Array) -> Array:
    """hidden [..., hidden_size] plus the chosen and the shared experts' output."""
    arrays = values.arrays
    normed = values.taps[NORM] = values.norm(hidden, NORM)
    tokens = normed.reshape(-1, part.hidden_size)
    logits = arrays.get(tokens @ values.plain(ROUTER).T)
    bias = arrays.get(values.plain(BIAS)) if part.options.choice == "group_top2" else None
    chosen, weights = routed(logits, bias, part.options)
    values.taps[CHOSEN] = chosen
    total = tokens * 0
    for expert in np.unique(chosen):
        gate, up, down = expert_modules(int(expert))
        token, place = np.nonzero(chosen == expert)
        here = arrays.index(token)
        product = gated_product(values, tokens[here], gate, up)
        total[here] += values.linear(product, down) * arrays.put(weights[token, place])[:, None]
    output = total.reshape(hidden.shape)
    if part.shared_size:
        product = values.taps[SHARED_PRODUCT] = gated_product(values, normed, SHARED_GATE, SHARED_UP)
        output = output + values.linear(product, SHARED_DOWN)
    return hidden + output


def routed(
    logits: NDArray[np.float32], bias: NDArray[np.float32] | None, options: ExpertOptions
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The experts of each token and their weights, [n, num_experts_per_tok], from the router's logits
    [n, num_experts]; bias: [num_experts], added for the choice alone.
    """
    scores: NDArray[Any]
    if options.scores == "softmax":
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores = scores / scores.sum(-1, keepdims=True)
    else:
        scores = 0.5 + 0.5 * np.tanh(0.5 * logits)
    ranked = scores if bias is None else scores + bias
    if options.choice != "greedy":
        groups = ranked.reshape(len(ranked), options.num_groups, -1)
        best = groups.max(-1) if bias is None else np.sort(groups, -1)[..., -2:].sum(-1)
        is_best = np.zeros(best.shape, bool)
        np.put_along_axis(is_best, np.argsort(-best, -1, kind="stable")[:, : options.topk_group], True, -1)
        ranked = np.where(is_best[..., None], groups, 0.0 if bias is None else -np.inf).reshape(ranked.shape)
    chosen = np.argsort(-ranked, -1, kind="stable")[:, : options.num_experts_per_tok]
    weights = np.take_along_axis(scores, chosen, -1)
    if options.is_normalised:
        weights = weights / (weights.sum(-1, keepdims=True) + TINY)
    return chosen, (weights * options.scale).astype(np.float32)
