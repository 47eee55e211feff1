"""FP8 layers that an FP8 engine can take over as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_triton.builders.checkpoint.quantized.scales import Fp8Weight


@dataclass(frozen=True)
class StoredFp8:
    """modules: the FP8 layers, by their names. is_per_tensor: each has one scale. is_static: each has an input scale.

    read: gives a layer by its module's name; the tensors count in the checkpoint's digest as if they were read by
    name.
    """

    modules: frozenset[str]
    is_per_tensor: bool
    is_static: bool
    read: Callable[[str], Fp8Weight]
