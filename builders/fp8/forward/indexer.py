"""The indexer in arrays: it chooses the tokens that latent attention looks at as its graph does.

See `builders/graph/indexer.py`.
"""

from __future__ import annotations

import numpy as np

from deepseek_triton.builders.fp8.forward.gqa import rotated
from deepseek_triton.builders.fp8.forward.values import LayerValues
from deepseek_triton.builders.fp8.rounding.arrays import Array
from deepseek_triton.ensemble.decoder.mla import (
    INDEX_BIAS,
    INDEX_K,
    INDEX_NORM,
    INDEX_NORM_EPS,
    INDEX_Q,
    INDEX_WEIGHTS,
)
from deepseek_triton.ensemble.decoder.options import IndexerOptions


def not_chosen(values: LayerValues, indexer: IndexerOptions, normed: Array, query_input: Array) -> Array:
    """[..., seq_len, kv_len]: 0 where the indexer looks, else minus infinity; of equal scores at the border all."""
    xp, arrays, heads = values.xp, values.arrays, indexer.num_heads
    query = (query_input @ values.plain(INDEX_Q).T).reshape(*normed.shape[:-1], heads, indexer.head_dim)
    query = _first_rotated(values, xp.swapaxes(query, -3, -2))
    key = normed @ values.plain(INDEX_K).T
    key = key - xp.mean(key, -1, keepdims=True)
    key = key / xp.sqrt(xp.mean(key * key, -1, keepdims=True) + INDEX_NORM_EPS)
    key = key * values.plain(INDEX_NORM) + values.plain(INDEX_BIAS)
    keys = values.kept("index", _first_rotated(values, key[..., None, :, :]))
    mask = values.causal_mask(normed.shape[-2], total := keys.shape[-2])
    if total <= indexer.topk:
        return mask
    weights = (normed @ values.plain(INDEX_WEIGHTS).T) * float((heads * indexer.head_dim) ** -0.5)
    products = xp.clip(query @ xp.swapaxes(keys, -2, -1), 0, None)  # [..., heads, seq_len, kv_len]
    scores = xp.sum(products * xp.swapaxes(weights, -2, -1)[..., None], -3) + mask
    found = arrays.get(scores)
    last = np.partition(found, total - indexer.topk, axis=-1)[..., total - indexer.topk, None]
    return arrays.put(np.where((found >= last) & (found > -np.inf), 0, -np.inf))


def _first_rotated(values: LayerValues, heads: Array) -> Array:
    """Rotary embedding of the first channels of heads [..., seq_len, head_dim]."""
    width = values.spec.rotary_dim
    return values.xp.concatenate([rotated(values, heads[..., :width]), heads[..., width:]], -1)
