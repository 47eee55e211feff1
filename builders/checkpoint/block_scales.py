"""DeepSeek's FP8 checkpoints: each 128 × 128 block of a weight has a factor, in a tensor named after the weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.safetensors import SAFETENSORS_DTYPES, TensorLocation
from deepseek_triton.builders.checkpoint.tensor_checks import FETCH_AGAIN
from deepseek_triton.builders.errors import CheckpointError

Array = NDArray[Any]
SCALE_SUFFIX = "_scale_inv"
SCALE_BLOCK = 128


def dequantize_blocks(codes: Array, scales: Array) -> NDArray[np.float32]:
    """Codes [out, in] times the factor of each 128 × 128 block, scales [out / 128, in / 128] rounded up → float32.

    Source: `weight_dequant` of DeepSeek-V3's inference/kernel.py.
    """
    values = np.empty(codes.shape, np.float32)
    for block, factors in enumerate(np.asarray(scales, np.float32)):
        rows = slice(block * SCALE_BLOCK, (block + 1) * SCALE_BLOCK)
        columns = np.repeat(factors, SCALE_BLOCK)[: codes.shape[1]]
        np.multiply(codes[rows].astype(np.float32), columns, out=values[rows])
    return values


def check_scales(tensors: Mapping[str, TensorLocation], scales: set[str], path: Path) -> None:
    """Every FP8 weight has its factors, of the right shape, and no other tensor has any."""
    fp8 = {name for name, tensor in tensors.items() if tensor.dtype == SAFETENSORS_DTYPES["F8_E4M3"]}
    for name in sorted({name.removesuffix(SCALE_SUFFIX) for name in scales} - fp8):
        raise CheckpointError(f"{path}: {name + SCALE_SUFFIX!r} belongs to no FP8 weight; {FETCH_AGAIN}")
    for name in sorted(fp8):
        if name + SCALE_SUFFIX not in scales:
            raise CheckpointError(f"{path}: {name!r} is FP8 and {name + SCALE_SUFFIX} is missing; {FETCH_AGAIN}")
        expected = tuple(-(-n // SCALE_BLOCK) for n in tensors[name].shape)
        found = tensors[name + SCALE_SUFFIX].shape
        if len(expected) != 2 or found != expected:
            raise CheckpointError(
                f"{path}: {name + SCALE_SUFFIX} has shape {list(found)}, {list(expected)} is needed for blocks of "
                f"{SCALE_BLOCK} × {SCALE_BLOCK}; {FETCH_AGAIN}"
            )
