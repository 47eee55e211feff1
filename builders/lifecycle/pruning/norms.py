"""L1 norms: how large the weights of a channel, of a group of heads or of a layer are. One tensor is read at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.lifecycle.pruning.kept import gated_mlps, head_columns, head_rows
from deepseek_triton.ensemble.decoder.spec import ModelSpec, layer_prefix

Scores = NDArray[np.float64]
Read = Callable[[str], NDArray[Any]]


def channel_norms(read: Read, spec: ModelSpec, layer: int) -> dict[str, Scores]:
    """Each gated MLP's inner channels: rows of gate and up, and columns of down, together."""
    found = {}
    for name in gated_mlps(spec, layer):
        rows = sum(_sums(read(f"{name}.{matrix}_proj.weight"), axis=1) for matrix in ("gate", "up"))
        found[name] = rows + _sums(read(f"{name}.down_proj.weight"), axis=0)
    return found


def group_norms(read: Read, spec: ModelSpec, layer: int) -> Scores:
    """Each group of heads: its rows of what makes queries, keys and values, and its columns of the output."""
    prefix, total = layer_prefix(layer), np.zeros(spec.num_kv_heads)
    for part in spec.parts(layer):
        for axis, widths in ((1, head_rows(part)), (0, head_columns(part))):
            for module, width in widths.items():
                sums = _sums(read(f"{prefix}{module}.weight"), axis)
                total += sums.reshape(-1, width).sum(axis=1)
    return total


def layer_norm(read: Read, spec: ModelSpec, layer: int) -> float:
    """Of all linear layers' weights, for each element."""
    total, elements = 0.0, 0
    for name, shape in spec.layer_shapes(layer).items():
        if len(shape) == 2:
            weight = np.abs(np.asarray(read(layer_prefix(layer) + name), np.float32))
            total, elements = total + float(weight.sum(dtype=np.float64)), elements + weight.size
    return total / elements


def _sums(weight: NDArray[Any], axis: int) -> Scores:
    sums: Scores = np.abs(np.asarray(weight, np.float32)).sum(axis=axis, dtype=np.float64)
    return sums
