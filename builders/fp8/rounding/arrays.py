"""The arrays of compensation and of the layers' forward pass: NumPy's, or torch's on a GPU. One code works on both.

Both libraries have the same names for most of what is needed; `Arrays` has the rest. Everything is float32, but for
second moments and their factors, which are float64. torch is imported only where it is installed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.fp8.rounding import host
from deepseek_triton.builders.graph.float8 import E4M3, E4M3_MAX

Array = Any  # NumPy's or torch's
ROW_BLOCK = 2**26  # elements of a weight whose errors are computed at a time


class Arrays:
    """NumPy on the cores of this machine. xp: the library; name: for messages."""

    name, is_gpu = "the processor", False
    xp: Any = np

    def free_bytes(self) -> int:
        """Memory that is free here."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def put(self, array: NDArray[Any]) -> Array:
        """An array as float32 here."""
        return np.asarray(array, np.float32)

    def index(self, array: NDArray[Any]) -> Array:
        """Whole numbers here, to index with."""
        return np.asarray(array, np.int64)

    def get(self, array: Array) -> NDArray[Any]:
        """A NumPy array of the same dtype."""
        return np.asarray(array)

    def zeros(self, *shape: int) -> Array:
        """float64 zeros."""
        return np.zeros(shape)

    def double(self, array: Array) -> Array:
        """As float64."""
        return array.astype(np.float64)

    def single(self, array: Array) -> Array:
        """As float32."""
        return array.astype(np.float32)

    def codes(self, divided: Array) -> NDArray[np.uint8]:
        """E4M3 codes of numbers of magnitude 448 at most, [n, k]."""
        return host.encode_rows(divided, np.ones(len(divided), np.float32)).view(np.uint8)

    def decoded(self, codes: NDArray[Any], scale: NDArray[np.float32]) -> Array:
        """E4M3 codes [n, k] times their scale, [n] or []."""
        values: NDArray[np.float32] = codes.astype(np.float32)
        values *= scale[:, None] if scale.ndim else scale
        return values

    def rounded(self, divided: Array) -> Array:
        """The nearest number that E4M3 has, ties to even, saturating: the shape of `divided`."""
        return host.nearest(divided)

    def place(self, weight: NDArray[Any]) -> Array:
        """A weight [n, k], for the calls below."""
        return weight

    def row_amax(self, placed: Array) -> NDArray[np.float32]:
        """The largest magnitude of each row: [n]; not finite where the row isn't."""
        return host.row_amax(placed)

    def row_errors(
        self, placed: Array, amax: NDArray[np.float32], factors: Sequence[float], importance: NDArray[Any] | None = None
    ) -> NDArray[np.float64]:
        """See `host.row_errors`."""
        return host.row_errors(placed, amax, factors, importance)

    def encode_rows(self, placed: Array, scale: NDArray[np.float32]) -> NDArray[Any]:
        """See `host.encode_rows`."""
        return host.encode_rows(placed, scale)


class TorchArrays(Arrays):
    """torch on a device."""

    def __init__(self, device: str) -> None:
        import torch

        self.xp, self.name = torch, device
        self._device = torch.device(device)
        self.is_gpu = self._device.type != "cpu"

    def free_bytes(self) -> int:
        if not self.is_gpu:
            return super().free_bytes()
        free: int = self.xp.cuda.mem_get_info(self._device)[0]
        return free

    def put(self, array: NDArray[Any]) -> Array:
        tensor = self._tensor(array)
        return tensor.to(self.xp.float32)

    def index(self, array: NDArray[Any]) -> Array:
        return self._tensor(np.ascontiguousarray(array, np.int64))

    def get(self, array: Array) -> NDArray[Any]:
        found: NDArray[Any] = array.cpu().numpy()
        return found

    def zeros(self, *shape: int) -> Array:
        return self.xp.zeros(shape, dtype=self.xp.float64, device=self._device)

    def double(self, array: Array) -> Array:
        return array.double()

    def single(self, array: Array) -> Array:
        return array.float()

    def codes(self, divided: Array) -> NDArray[np.uint8]:
        codes = self._codes(divided.contiguous()).view(self.xp.uint8)
        found: NDArray[np.uint8] = codes.cpu().numpy()
        return found

    def decoded(self, codes: NDArray[Any], scale: NDArray[np.float32]) -> Array:
        values = self._tensor(codes.view(np.uint8)).view(self.xp.float8_e4m3fn).to(self.xp.float32)
        return values * self.put(scale[:, None] if scale.ndim else scale)

    def rounded(self, divided: Array) -> Array:
        return self._codes(divided).to(self.xp.float32)

    def place(self, weight: NDArray[Any]) -> Array:
        return self.put(weight)

    def row_amax(self, placed: Array) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.get(placed.abs().amax(1))
        return found

    def row_errors(
        self, placed: Array, amax: NDArray[np.float32], factors: Sequence[float], importance: NDArray[Any] | None = None
    ) -> NDArray[np.float64]:
        unit = self.put(np.maximum(amax, np.finfo(np.float32).tiny) / np.float32(E4M3_MAX))[:, None]
        weights = None if importance is None else self.put(importance)
        errors = np.empty((len(factors), len(placed)), np.float64)
        for start in range(0, len(placed), height := max(1, ROW_BLOCK // placed.shape[1])):
            rows = slice(start, start + height)
            full = placed[rows] / unit[rows]
            for factor, error in zip(factors, errors, strict=True):
                y = full * (1 / factor)
                difference = self.rounded(y) - y
                square = difference * difference
                total = square.sum(1) if weights is None else square @ weights
                error[rows] = self.get(total * (unit[rows, 0] * factor) ** 2)
        return errors

    def encode_rows(self, placed: Array, scale: NDArray[np.float32]) -> NDArray[Any]:
        return self.codes(placed / self.put(scale)[:, None]).view(E4M3)

    def _codes(self, divided: Array) -> Array:
        return divided.clamp(-E4M3_MAX, E4M3_MAX).to(self.xp.float8_e4m3fn)  # torch doesn't saturate by itself

    def _tensor(self, array: NDArray[Any]) -> Array:
        """Copied as it is stored: bfloat16 is widened on the device."""
        bits = np.ascontiguousarray(array)
        is_bf16 = bits.dtype == host.BF16
        bits = bits.view(np.int16) if is_bf16 else bits
        bits = bits if bits.flags.writeable else bits.copy()  # torch has no read-only arrays
        tensor = self.xp.from_numpy(bits).to(self._device, copy=True)
        return tensor.view(self.xp.bfloat16) if is_bf16 else tensor


@cache
def best_arrays() -> Arrays:
    """torch on a GPU where it sees one, else NumPy."""
    try:
        import torch
    except ImportError:
        return Arrays()
    return TorchArrays("cuda") if torch.cuda.is_available() else Arrays()
