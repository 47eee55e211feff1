"""Write a Hugging Face checkpoint: tensors one at a time, in shards of a few GB, and config.json.

What enters is names, dtypes, shapes and a stream of arrays in that order. Nothing here knows where they come from; the
caller gives a directory that becomes visible when all of it is there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.files.weight_files import INDEX
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.artefacts.tensor_file import ITEM_BYTES, TensorEntry, write_tensors

SHARD_BYTES = 5 * 10**9
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Tensors = Iterator[tuple[str, NDArray[Any]]]


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    tensors: Tensors,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and the weights into `directory`.

    Args:
        entries: each tensor's dtype and shape, in the order of `tensors`.
        tensors: name and array of each; an array of another dtype is converted.

    Raises:
        BuildError: a number is too large for its dtype, or NaN.
        OSError: the disk is full, or can't be written.
    """
    shards = _shards(entries, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        write_tensors(directory / file, shard, _converted(tensors, shard))
    if len(shards) > 1:
        total = sum(entry.num_bytes for entry in entries.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    _write_json(directory / "config.json", config)


def most_common_dtype(entries: Mapping[str, TensorEntry]) -> str:
    """torch's name of the dtype that most elements have: what config.json says of a checkpoint."""
    elements = dict.fromkeys(ITEM_BYTES, 0)
    for entry in entries.values():
        elements[entry.dtype] += math.prod(entry.shape)
    return TORCH_NAMES[max(elements, key=elements.__getitem__)]


def _shards(entries: Mapping[str, TensorEntry], shard_bytes: int) -> list[dict[str, TensorEntry]]:
    shards: list[dict[str, TensorEntry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.num_bytes
    return shards


def _converted(tensors: Tensors, shard: Mapping[str, TensorEntry]) -> Tensors:
    """As many of `tensors` as the shard holds, in its dtypes."""
    for wanted in shard:
        name, array = next(tensors, (f"nothing instead of {wanted}", np.zeros(0, np.float32)))
        dtype = DTYPES[shard[wanted].dtype]
        if array.dtype != dtype:
            with np.errstate(over="ignore"):  # the next line says so
                array = array.astype(dtype)
            if not np.isfinite(array.astype(np.float32)).all():
                raise BuildError(
                    f"{name} has numbers that {TORCH_NAMES[shard[wanted].dtype]} can't hold; use --dtype float32"
                )
        yield name, array


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
