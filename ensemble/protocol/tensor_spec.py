"""The description of one tensor that crosses a model boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["BOOL", "INT32", "INT64", "UINT64", "FP32", "STRING"]


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor: its Triton dtype, its shape without the batch dimension (-1: any), if it may be absent."""

    name: str
    dtype: DType
    dims: tuple[int, ...] = (1,)
    optional: bool = False
