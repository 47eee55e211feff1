"""Where the tensors of a safetensors file are, checked against the file's size.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.files.missing import FETCH_AGAIN, open_file
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError

SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
WEIGHT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")
SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0")
# The other dtypes of the format: a tensor that takes no part may have them. Name → bytes of an element.
OTHER_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "F64": 8,
    "C64": 8,
}  # fmt: skip
ITEM_BYTES = {name: dtype.itemsize for name, dtype in SAFETENSORS_DTYPES.items()} | OTHER_ITEM_BYTES
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor's bytes are: file, dtype by its safetensors name, shape, byte offset and length."""

    file: Path
    dtype_name: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's dtype; KeyError for one that is in OTHER_ITEM_BYTES."""
        return SAFETENSORS_DTYPES[self.dtype_name]


def check_dtype(name: str, tensor: TensorLocation, supported: Sequence[str]) -> None:
    """Raise UnsupportedError where the tensor called `name` has none of the `supported` dtypes."""
    if tensor.dtype_name not in supported:
        known = ", ".join(supported)
        way_out = "convert it with save_pretrained"
        if tensor.dtype_name[:1] in "UI":
            way_out = "integers are of a quantised checkpoint: give the one that it was made from"
        raise UnsupportedError(
            f"{tensor.file}: {name!r} has dtype {tensor.dtype_name!r}; supported: {known}; {way_out}"
        )


def read_safetensors_header(file: Path) -> dict[str, TensorLocation]:
    """Every tensor's place in one safetensors file, checked against the file's size."""
    with open_file(file) as stream:
        try:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is not a safetensors file, or was cut short; {FETCH_AGAIN}")
            header = json.loads(stream.read(length))
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}; {FETCH_AGAIN}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} has a corrupt safetensors header; {FETCH_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a corrupt safetensors header; {FETCH_AGAIN}")

    tensors: dict[str, TensorLocation] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype_name, shape = str(entry["dtype"]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise ValueError("sizes must be whole numbers")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} has a corrupt entry for {name!r}; {FETCH_AGAIN}") from error
        num_bytes = math.prod(shape) * ITEM_BYTES.get(dtype_name, 0)
        if dtype_name in ITEM_BYTES and end - begin != num_bytes:
            raise CheckpointError(
                f"{file}: {name!r} has {end - begin} bytes, its shape {list(shape)} needs {num_bytes}; {FETCH_AGAIN}"
            )
        ranges.append((begin, end, name))
        tensors[name] = TensorLocation(file, dtype_name, shape, 8 + length + begin, end - begin)
    _check_ranges(file, ranges, size - 8 - length)
    return tensors


def read_bytes(name: str, location: TensorLocation) -> NDArray[np.uint8]:
    """The bytes of the tensor called `name`."""
    try:
        with location.file.open("rb") as stream:
            stream.seek(location.offset)
            # Read, not mapped: mapped pages would count as this process's memory until the kernel drops them.
            array = np.fromfile(stream, dtype=np.uint8, count=location.length)
    except OSError as error:
        raise CheckpointError(f"{location.file}: {error.strerror}; {FETCH_AGAIN}") from error
    if array.size != location.length:
        raise CheckpointError(f"{location.file} ends inside {name}; {FETCH_AGAIN}")
    return array


def _check_ranges(file: Path, ranges: list[tuple[int, int, str]], size: int) -> None:
    """The format wants the tensors end to end over the whole buffer of `size` bytes."""
    for _, end, name in ranges:
        if end > size:
            raise CheckpointError(f"{file} ends inside {name!r}; {FETCH_AGAIN}")
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise CheckpointError(f"{file}: {name!r} begins at byte {begin}, not at {position}; {FETCH_AGAIN}")
        position = end
    if position != size:
        raise CheckpointError(f"{file} has {size - position} bytes that belong to no tensor; {FETCH_AGAIN}")
