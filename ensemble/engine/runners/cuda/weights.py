"""Where the runner's weights come from: a built artefact, or random numbers of the same shape.

A source gives tensors by the names of `ensemble/cuda_layout.py`; what it knows of a GPU is the device to put them on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from ensemble.cuda_layout import DecoderShape
from ensemble.tensor_file import TensorEntry, TensorFile

DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class WeightSource(Protocol):
    """Tensors by name."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """What there is."""

    def load(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor `name` on `device`."""


class StoredWeights:
    """The weights of a file that the builder wrote."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        self.entries = self._file.entries

    def load(self, name: str, device: torch.device) -> torch.Tensor:
        entry = self.entries[name]
        target = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=device)
        source = self._file.read(name)
        flat = target.view(-1).view(torch.uint8)
        for start in range(0, len(source), BLOCK_BYTES):  # no second whole copy in memory
            part = torch.from_numpy(source[start : start + BLOCK_BYTES].copy())
            flat[start : start + BLOCK_BYTES].copy_(part)
        return target


class RandomWeights:
    """Weights for measuring speed, made on the device: no file of many gigabytes has to be there.

    Scales are those of a freshly initialised model, so that activations stay finite through all layers.
    """

    def __init__(self, shape: DecoderShape, *, is_fp8: bool, has_qkv_bias: bool, seed: int = 0) -> None:
        names = shape.linear_names()
        biased = frozenset(name for name in names if has_qkv_bias and name.endswith("qkv"))
        self.entries = shape.entries(frozenset(names) if is_fp8 else frozenset(), biased)
        self._seed = seed

    def load(self, name: str, device: torch.device) -> torch.Tensor:
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        generator = torch.Generator(device).manual_seed(self._seed + hash_of(name))
        kind = name.rsplit(".", 1)[-1]
        if kind.endswith("norm"):
            return torch.ones(entry.shape, dtype=dtype, device=device)
        if kind == "scale":
            columns = self.entries[name.removesuffix("scale") + "weight"].shape[1]
            return torch.full(entry.shape, columns**-0.5 / CODES_STD, device=device)
        if kind in ("cos", "sin"):
            angles = torch.arange(entry.shape[0], device=device)[:, None] * 10000.0 ** -(
                torch.arange(entry.shape[1], device=device) / entry.shape[1]
            )
            return torch.cos(angles) if kind == "cos" else torch.sin(angles)
        std = CODES_STD if dtype == torch.float8_e4m3fn else entry.shape[-1] ** -0.5
        tensor = torch.empty(entry.shape, dtype=dtype, device=device)
        rows = max(1, BLOCK_BYTES // (4 * entry.shape[-1]))
        for part in torch.split(tensor, rows):
            noise = torch.empty(part.shape, device=device).normal_(0, std, generator=generator)
            part.copy_(noise.clamp_(-448, 448))
        return tensor


BLOCK_BYTES = 64 * 2**20
CODES_STD = 100.0  # of random E4M3 codes: nearly all of them below the largest, 448


def hash_of(name: str) -> int:
    """A small number, the same in every process."""
    return sum((index + 1) * byte for index, byte in enumerate(name.encode())) % 2**31
