"""The order of rotary channels: this project rotates the first half of a head's channels with the second."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.decoder.part import Linear, Rotary
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Array = NDArray[Any]


def rotary_modules(spec: ModelSpec) -> dict[str, Rotary]:
    """The linear layers whose output gets a rotary embedding, by their whole names."""
    return {
        layer_prefix(layer) + module.module: module.rotary
        for layer in range(spec.num_layers)
        for part in spec.parts(layer)
        for module in part.modules
        if isinstance(module, Linear) and module.rotary is not None
    }


def halves_from_pairs(rows: Array, rotary: Rotary) -> Array:
    """Reorder a weight's or bias's `rows` [out, …] that a checkpoint stores as pairs of neighbours to be rotated.

    Channels 0, 1, 2, 3, … of a head's rotary part become 0, 2, …, 1, 3, …; queries and keys are reordered alike, so
    that their products stay what they were.
    """
    pairs = np.arange(rotary.width).reshape(-1, 2).T.reshape(-1)
    order = np.arange(rotary.head_dim)
    order[rotary.start : rotary.start + rotary.width] = rotary.start + pairs
    return _in_order(rows, rotary, order)


def pairs_from_halves(rows: Array, rotary: Rotary) -> Array:
    """The way back of `halves_from_pairs`, for a checkpoint that is written."""
    halves = np.arange(rotary.width).reshape(2, -1).T.reshape(-1)
    order = np.arange(rotary.head_dim)
    order[rotary.start : rotary.start + rotary.width] = rotary.start + halves
    return _in_order(rows, rotary, order)


def _in_order(rows: Array, rotary: Rotary, order: NDArray[np.int64]) -> Array:
    heads = rows.reshape(rotary.num_heads, rotary.head_dim, -1)
    return heads[:, order].reshape(rows.shape)
