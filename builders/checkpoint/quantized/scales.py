"""FP8 weights and the scales beside them: one for a weight, for each row, or for each block.

Names, for a module X: `X.weight` E4M3 codes [out, in]; `X.weight_scale`, or DeepSeek's `X.weight_scale_inv` (which
multiplies as well, in spite of its name); `X.input_scale`, or `X.activation_scale`, where activations are static.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.files.safetensors import TensorLocation
from deepseek_triton.builders.checkpoint.quantized.scheme import Fp8Scheme
from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.ensemble.artefacts.cuda_layout import BLOCK_COLUMNS

Array = NDArray[Any]
CODES = "F8_E4M3"
WEIGHT_SCALES = (".weight_scale", ".weight_scale_inv")
INPUT_SCALES = (".input_scale", ".activation_scale")
ZERO_POINTS = (".weight_zero_point", ".input_zero_point")


@dataclass(frozen=True)
class Fp8Weight:
    """A linear layer's weight as it is stored.

    codes: E4M3 [out, in]. scale: float32, [] or [out]; a weight is code × scale; or [out, blocks], one for so many
    neighbouring columns of a row, 128. input_scale: of the activations; None: each token's own.
    """

    codes: Array
    scale: NDArray[np.float32]
    input_scale: float | None = None

    def dequantized(self) -> NDArray[np.float32]:
        """[out, in] float32, exact."""
        values: NDArray[np.float32] = self.codes.astype(np.float32)
        values *= spread_scale(self.scale, values.shape[1])
        return values


def spread_scale(scale: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    """A scale, [], [out] or [out, blocks], as what multiplies the codes [out, columns]."""
    if scale.ndim < 2:
        return scale[:, None] if scale.ndim else scale
    repeated: NDArray[np.float32] = np.repeat(scale, BLOCK_COLUMNS, axis=1)[:, :columns]
    return repeated


@dataclass(frozen=True)
class Fp8Names:
    """The names of one FP8 module's tensors. is_block: its scale is one for each block. zero_points: all zero."""

    weight: str
    scale: str
    is_block: bool
    input_scale: str | None = None
    zero_points: tuple[str, ...] = ()

    def companions(self) -> list[str]:
        """The tensors beside the weight."""
        return [self.scale, *([self.input_scale] if self.input_scale else []), *self.zero_points]


def fp8_modules(tensors: Mapping[str, TensorLocation], scheme: Fp8Scheme, path: Path) -> dict[str, Fp8Names]:
    """Every FP8 module: it has its scales, of the right shape, and no other tensor has any.

    Raises:
        CheckpointError: a scale is missing, surplus or mis-shaped.
    """
    modules = {}
    codes = [name for name, tensor in tensors.items() if tensor.dtype_name == CODES and not name.endswith(ZERO_POINTS)]
    for name in sorted(codes):
        module = name.removesuffix(".weight")
        scales = [module + suffix for suffix in WEIGHT_SCALES if module + suffix in tensors]
        if len(scales) != 1 or module == name:
            raise CheckpointError(
                f"{path}: {name!r} is FP8, and {module}{' or '.join(WEIGHT_SCALES)} is missing: it can't be read "
                "without its scale"
                if not scales
                else f"{path}: {name!r} has two scales, {' and '.join(scales)}"
            )
        is_block = _is_block(name, scales[0], tensors, scheme, path)
        inputs = [module + suffix for suffix in INPUT_SCALES if module + suffix in tensors]
        if scheme.is_static and not inputs and not is_block:
            raise CheckpointError(f"{path}: activations are static, and {module}{INPUT_SCALES[0]} is missing")
        zeros = tuple(module + suffix for suffix in ZERO_POINTS if module + suffix in tensors)
        modules[module] = Fp8Names(name, scales[0], is_block, inputs[0] if inputs else None, zeros)
    for name in sorted(tensors):
        for suffix in (*WEIGHT_SCALES, *INPUT_SCALES, *ZERO_POINTS):
            if name.endswith(suffix) and name.removesuffix(suffix) not in modules:
                weight = tensors.get(name.removesuffix(suffix) + ".weight")
                stored = f": its weight is {weight.dtype_name}, not {CODES}" if weight is not None else ""
                raise CheckpointError(f"{path}: {name!r} belongs to no FP8 weight{stored}")
    return modules


def _is_block(name: str, scale: str, tensors: Mapping[str, TensorLocation], scheme: Fp8Scheme, path: Path) -> bool:
    shape, found = tensors[name].shape, tensors[scale].shape
    if len(shape) == 2:
        if scheme.block and found == tuple(-(-n // block) for n, block in zip(shape, scheme.block, strict=True)):
            return True
        if scheme.has_plain and found in ((), (1,), (1, 1), (shape[0],), (shape[0], 1)):
            return False
    needed = ["one scale, or one for each row"] if scheme.has_plain else []
    needed += [f"one for each block of {scheme.block[0]} × {scheme.block[1]}"] if scheme.block else []
    raise CheckpointError(
        f"{path}: {scale} has shape {list(found)}, the weight {list(shape)}; needed: {', or '.join(needed)}"
    )


def dequantize_blocks(codes: Array, scales: Array, block: tuple[int, int]) -> NDArray[np.float32]:
    """Codes [out, in] times the scale of each block, scales [out / rows, in / columns] rounded up → float32.

    Source: `weight_dequant` of DeepSeek-V3's inference/kernel.py.
    """
    values = np.empty(codes.shape, np.float32)
    for i, factors in enumerate(np.asarray(scales, np.float32)):
        rows = slice(i * block[0], (i + 1) * block[0])
        columns = np.repeat(factors, block[1])[: codes.shape[1]]
        np.multiply(codes[rows].astype(np.float32), columns, out=values[rows])
    return values


def checked_scale(name: str, scale: Array) -> NDArray[np.float32]:
    """A scale as float32.

    Raises:
        CheckpointError: it isn't a finite number, or is negative.
    """
    values = np.asarray(scale, np.float32)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise CheckpointError(f"{name} holds scales that are no finite positive numbers: the checkpoint is damaged")
    return values
