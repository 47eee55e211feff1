"""Sources of the runner's weights: a built artefact, or random numbers of the same shapes.

A source loads tensors by their names in `ensemble/artefacts/cuda_layout.py`, whole or one rank's shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry, TensorFile
from deepseek_triton.ensemble.decoder.part import WHOLE, Shard
from deepseek_triton.ensemble.engine.runners.cuda.startup.pinned_copy import pinned_copy

DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class WeightSource(Protocol):
    """Tensors by name."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The stored tensors by name."""

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        """Load the tensor `name`, or its `shard`, onto `device`."""


@dataclass(frozen=True)
class WeightLoader:
    """Reads the tensors of `source` whose names begin with `prefix` onto `device`; dtype: of what isn't FP8."""

    source: WeightSource
    device: torch.device
    dtype: torch.dtype
    prefix: str = ""

    def under(self, prefix: str) -> WeightLoader:
        """The loader of the tensors below `prefix`."""
        return replace(self, prefix=self.prefix + prefix)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name`, converted to `dtype` where one is given."""
        tensor = self.source.load(self.prefix + name, self.device)
        return tensor if dtype is None else tensor.to(dtype)

    def optional(self, name: str) -> torch.Tensor | None:
        """The tensor `name`; None: it isn't stored."""
        return self.tensor(name) if self.prefix + name in self.source.entries else None


class StoredWeights:
    """The weights of a file that the builder wrote."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        self.entries = self._file.entries

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        entry = self.entries[name]
        target = torch.empty(shard.shape(entry.shape), dtype=DTYPES[entry.dtype], device=device)
        if shard == WHOLE and device.type == "cuda":
            pinned_copy(target.device)(self._file.read(name), target.view(-1).view(torch.uint8))
            return target
        itemsize = target.element_size()
        num_rows, shard_rows = _rows(shard, entry.shape)
        source = self._file.read(name).reshape(num_rows, -1)  # bytes of each row
        if shard.columns is not None:
            source = source[:, shard.columns.start * itemsize : shard.columns.stop * itemsize]
        flat = target.view(-1).view(torch.uint8).view(-1, source.shape[1])
        block, row = max(1, BLOCK_BYTES // source.shape[1]), 0
        for rows in shard_rows:
            for start in range(
                rows.start, rows.stop, block
            ):  # in blocks, so that there is no second copy of the whole in memory
                part = source[start : min(start + block, rows.stop)].copy()
                flat[row : row + len(part)].copy_(torch.from_numpy(part))
                row += len(part)
        return target


def _rows(shard: Shard, shape: tuple[int, ...]) -> tuple[int, tuple[slice, ...]]:
    """The rows of a stored tensor, those of a stack's matrices one after the other, and which of them a shard has."""
    if shard.matrices is None:
        return shape[0], shard.rows or (slice(0, shape[0]),)
    rows, matrices = shape[1], shard.matrices
    if shard.rows is None:
        return shape[0] * rows, (slice(matrices.start * rows, matrices.stop * rows),)
    of_all = (
        slice(matrix * rows + of_one.start, matrix * rows + of_one.stop)
        for matrix in range(matrices.start, matrices.stop)
        for of_one in shard.rows
    )
    return shape[0] * rows, tuple(of_all)


class SplitWeights:
    """One rank's shards of a source."""

    def __init__(self, source: WeightSource, split: ShardedDecoder) -> None:
        self._source, self._split = source, split
        self.entries = {name: split.entry(name, entry) for name, entry in source.entries.items()}

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        assert shard == WHOLE, "a part isn't split again"
        return self._source.load(name, device, self._split.shard(name))


class RandomWeights:
    """Weights for measuring speed, made on the device: no file of many gigabytes has to be there.

    Scales are those of a freshly initialised model, so that activations stay finite through all layers.
    """

    def __init__(self, shape: DecoderShape, *, is_fp8: bool, has_qkv_bias: bool, seed: int = 0) -> None:
        names = [name for name in shape.linear_names() if not name.endswith(".kv_b")]  # it is never FP8
        biased = frozenset(name for name in names if has_qkv_bias and name.endswith("qkv"))
        self.entries = shape.entries(frozenset(names) if is_fp8 else frozenset(), biased)
        self._seed = seed

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        whole, axis = self._make(name, device), 0
        if shard.matrices is not None:
            whole, axis = whole[shard.matrices], 1
        if shard.rows is not None:
            whole = torch.cat([whole.narrow(axis, rows.start, rows.stop - rows.start) for rows in shard.rows], axis)
        return (whole if shard.columns is None else whole[..., shard.columns]).contiguous()

    def _make(self, name: str, device: torch.device) -> torch.Tensor:
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        generator = torch.Generator(device).manual_seed(self._seed + hash_of(name))
        kind = name.rsplit(".", 1)[-1]
        if kind.endswith("norm"):
            return torch.ones(entry.shape, dtype=dtype, device=device)
        if kind == "scale":
            columns = self.entries[name.removesuffix("scale") + "weight"].shape[-1]
            return torch.full(entry.shape, columns**-0.5 / CODES_STD, device=device)
        if kind in ("cos", "sin"):
            angles = torch.arange(entry.shape[0], device=device)[:, None] * 10000.0 ** -(
                torch.arange(entry.shape[1], device=device) / entry.shape[1]
            )
            return torch.cos(angles) if kind == "cos" else torch.sin(angles)
        std = CODES_STD if dtype == torch.float8_e4m3fn else entry.shape[-1] ** -0.5
        tensor = torch.empty(entry.shape, dtype=dtype, device=device)
        rows = max(1, BLOCK_BYTES // (4 * entry.shape[-1]))
        for part in torch.split(tensor.view(-1, entry.shape[-1]), rows):
            noise = torch.empty(part.shape, device=device).normal_(0, std, generator=generator)
            part.copy_(noise.clamp_(-448, 448))
        return tensor


BLOCK_BYTES = 64 * 2**20
CODES_STD = 100.0  # of random E4M3 codes: nearly all of them below the largest, 448


def hash_of(name: str) -> int:
    """A small number, the same in every process."""
    return sum((index + 1) * byte for index, byte in enumerate(name.encode())) % 2**31
