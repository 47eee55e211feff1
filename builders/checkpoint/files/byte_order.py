"""Tensors of a big-endian GGUF in this machine's byte order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.errors import UnsupportedError

# Type of quantised blocks → where in a block its float16 numbers lie, in bytes; all else in it is single bytes.
# Source: gguf's scripts/gguf_convert_endian.py.
FLOAT16_AT: dict[str, tuple[int, ...]] = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def in_native_order(tensor: Any) -> NDArray[Any]:
    """The data of a big-endian file's tensor, as `gguf` would give it from a little-endian one.

    Raises:
        UnsupportedError: nobody says where the numbers lie in blocks of its type.
    """
    import gguf

    name, data = tensor.tensor_type.name, tensor.data
    if data.dtype != np.uint8:
        return np.asarray(data.astype(data.dtype.newbyteorder("=")))
    if name == "BF16":
        return np.asarray(data.view(np.uint16).byteswap().view(np.uint8))
    if name not in FLOAT16_AT:
        known = ", ".join(("F32", "F16", "BF16", *FLOAT16_AT))
        raise UnsupportedError(
            f"{tensor.name} has type {name}, which is not read from a big-endian GGUF; supported there: {known}; give "
            "a little-endian file"
        )
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    blocks = np.array(data).reshape(-1, size)
    for start in FLOAT16_AT[name]:
        blocks[:, start : start + 2] = blocks[:, [start + 1, start]]
    return blocks.reshape(data.shape)
