"""Where the tensors of a safetensors file are, checked against the file's size.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deepseek_triton.builders.checkpoint.tensor_checks import FETCH_AGAIN, read_json
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError

SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
# Buffers that older checkpoints carry and every graph recomputes.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor's bytes are: file, dtype, shape, byte offset and length."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    length: int


def read_safetensors_header(file: Path) -> dict[str, TensorLocation]:
    """Every tensor's place in one safetensors file, checked against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
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
        ranges.append((begin, end, name))
        if name.endswith(IGNORED_SUFFIXES):
            continue
        if dtype_name not in SAFETENSORS_DTYPES:
            known = ", ".join(SAFETENSORS_DTYPES)
            raise UnsupportedError(
                f"{file}: {name!r} has dtype {dtype_name!r}; supported: {known}; convert it with save_pretrained"
            )
        dtype = SAFETENSORS_DTYPES[dtype_name]
        num_bytes = math.prod(shape) * dtype.itemsize
        if end - begin != num_bytes:
            raise CheckpointError(
                f"{file}: {name!r} has {end - begin} bytes, its shape {list(shape)} needs {num_bytes}; {FETCH_AGAIN}"
            )
        tensors[name] = TensorLocation(file, dtype, shape, 8 + length + begin, end - begin)
    _check_ranges(file, ranges, size - 8 - length)
    return tensors


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


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of the checkpoint in `path`: those of its index, or all that there are."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; {FETCH_AGAIN}")
        names = weight_map.values()
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CheckpointError(f"{index}: weight_map must name files beside it; {FETCH_AGAIN}")
        return [path / name for name in sorted(set(names))]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no .safetensors file; convert the weights with save_pretrained")
    return files
