"""Safetensors files: tensors by name, written one after another and read through a memory map.

This module knows bytes, shapes and dtype names; it knows nothing about models. It reads and writes raw bytes, so that
E4M3 and bfloat16 need neither torch nor ml_dtypes.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.artefacts.hashed_file import HashedFile

ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}
ALIGNMENT = 256  # bytes; the tensors begin at a multiple of it


class TensorFileError(Exception):
    """The file is missing, cut short, or not what it says; one line."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's dtype, by its safetensors name, and shape."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise TensorFileError(f"dtype is {self.dtype!r}, must be one of {', '.join(ITEM_BYTES)}")

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Array = NDArray[Any]


def write_tensors(
    path: Path, entries: Mapping[str, TensorEntry], arrays: Iterable[tuple[str, Array | Iterator[Array]]]
) -> str:
    """Write `arrays` to `path`; they have the order, dtypes and shapes of `entries`.

    An iterator gives a tensor in pieces along its first axis, one after the other, so that it needn't be in memory
    whole.

    Returns:
        The file's SHA-256 in hexadecimal.

    Raises:
        TensorFileError: an array is missing, surplus, or unlike its entry.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry.num_bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # the format allows spaces after the header
    expected = iter(entries.items())
    with HashedFile(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, given in arrays:
            wanted, entry = next(expected, ("nothing more", TensorEntry("F32", ())))
            rows = num_bytes = 0
            for array in given if isinstance(given, Iterator) else (given,):
                rows, num_bytes = rows + len(array), num_bytes + array.nbytes
                whole = (rows, *array.shape[1:])
                is_over = num_bytes > entry.num_bytes or whole[1:] != entry.shape[1:]
                if name != wanted or is_over or (array is given and whole != entry.shape):
                    raise TensorFileError(f"{path}: got {name} {array.dtype} {list(whole)}, expected {wanted} {entry}")
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            if num_bytes != entry.num_bytes:
                raise TensorFileError(f"{path}: got {num_bytes} bytes of {name}, expected {wanted} {entry}")
        if (left := next(expected, None)) is not None:
            raise TensorFileError(f"{path}: {left[0]} was not given")
    return stream.sha256


class TensorFile:
    """A file's tensors, mapped into memory; `entries` has them by name.

    Raises:
        TensorFileError: the file can't be read, or its header doesn't fit its size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(length, 2**28)))
            self._data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r", offset=8 + length)
            self._places = {name: tuple(map(int, entry["data_offsets"])) for name, entry in header.items()}
            self.entries = {name: TensorEntry(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        except OSError as error:
            raise TensorFileError(f"{path}: {error.strerror}; build the model again") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TensorFileError(f"{path} is not a tensor file, or was cut short; build the model again") from error
        for name, (begin, end) in self._places.items():
            if end - begin != self.entries[name].num_bytes or not 0 <= begin <= end <= len(self._data):
                raise TensorFileError(f"{path}: {name} doesn't lie where the header says; build the model again")

    def read(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, flat and read-only."""
        begin, end = self._places[name]
        return self._data[begin:end]
