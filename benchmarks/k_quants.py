"""A GGUF file's matrices rounded to another type of blocks by ggml's own encoder, as llama-quantize does.

Source: `ggml_quantize_chunk`, https://github.com/ggml-org/llama.cpp/blob/master/ggml/include/ggml.h; types of rows
that are no multiple of 256: `llama_tensor_get_type`, src/llama-quant.cpp.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from numpy.typing import NDArray

OTHERWISE = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
EMBEDDING = "token_embd.weight"  # keeps its type


def write_k_quants(source: Path, target: Path, kind: str, ggml: Path) -> dict[str, int]:
    """Copy `source` with its matrices in `kind`; returns the types that they have got → how many.

    kind: a key of OTHERWISE. ggml: libggml-base, which npm's node-llama-cpp brings.
    """
    encode = ctypes.CDLL(str(ggml.resolve())).ggml_quantize_chunk
    encode.restype = ctypes.c_size_t
    encode.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    reader, counts = GGUFReader(source), dict[str, int]()
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        items = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=items)
    for tensor in reader.tensors:
        if len(tensor.shape) < 2 or tensor.name == EMBEDDING:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        own = kind if weight.shape[1] % 256 == 0 else OTHERWISE[kind]
        counts[own] = counts.get(own, 0) + 1
        writer.add_tensor(tensor.name, _encoded(encode, weight, own), raw_dtype=GGMLQuantizationType[own])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return counts


def _encoded(encode: Any, weight: NDArray[np.float32], kind: str) -> NDArray[np.uint8]:
    """weight [out, in] → [out, bytes of a row]."""
    rows, columns = weight.shape
    number = GGMLQuantizationType[kind]
    block_size, block_bytes = GGML_QUANT_SIZES[number]
    blocks = np.zeros((rows, columns // block_size * block_bytes), np.uint8)
    if encode(number.value, weight.ctypes.data, blocks.ctypes.data, 0, rows, columns, None) != blocks.nbytes:
        raise SystemExit(f"error: ggml wrote another number of bytes of {kind} than {blocks.nbytes}")
    return blocks
