"""What the input channels of a matrix give to its output on a text, and the matrix fitted anew without some of them.

Enters: the second moment M of the inputs [n, n] and the weight W [out, n]. A group g of channels matters as much as its
part of the output is large: E‖W_g x_g‖². The rest is fitted by least squares: W′ = W·M[:, kept]·M[kept, kept]⁻¹
minimises E‖W x − W′ x_kept‖².
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.rounding.arrays import Array, Arrays
from deepseek_triton.builders.lifecycle.pruning.kept import Indices

DAMPING = 0.01  # of the mean of the moment's diagonal, added to it: a text shows fewer directions than there are


class InputMoment:
    """Running Σ x·xᵀ of a matrix's inputs, float64, where the layer is computed."""

    def __init__(self, channels: int, arrays: Arrays) -> None:
        self._arrays, self._moment = arrays, arrays.zeros(channels, channels)

    def add(self, rows: Array) -> None:
        """rows [n, channels] float32."""
        self._moment = self._moment + self._arrays.double(rows.T @ rows)

    def scores(self, weight: NDArray[Any], width: int) -> NDArray[np.float64]:
        """Σ‖W_g x_g‖² of each group of `width` neighbouring channels: [channels / width]."""
        here, xp = self._arrays, self._arrays.xp
        placed = here.double(here.put(weight))
        if width == 1:
            scores = xp.sum(placed * placed, 0) * xp.diagonal(self._moment)
            return np.asarray(here.get(scores), np.float64)
        found = []
        for start in range(0, placed.shape[1], width):
            part = placed[:, start : start + width]
            own = self._moment[start : start + width, start : start + width]
            found.append(float(here.get(xp.sum((part.T @ part) * own))))
        return np.asarray(found)

    def refitted(self, weight: NDArray[Any], kept: Indices) -> NDArray[np.float32]:
        """The weight [out, kept] that comes nearest to `weight` [out, channels] on these inputs."""
        here, xp = self._arrays, self._arrays.xp
        index = here.index(kept)
        rows = self._moment[index]
        own = rows[:, index]
        damping = DAMPING * float(here.get(xp.mean(xp.diagonal(own))))
        placed = here.double(here.put(weight))
        # Damping pulls towards the weights as they were, not towards zero.
        right = rows @ placed.T + damping * placed[:, index].T
        own = own + damping * here.double(here.put(np.eye(len(kept), dtype=np.float32)))
        fitted = xp.linalg.solve(own, right)
        found: NDArray[np.float32] = np.asarray(here.get(here.single(fitted))).T
        return found
