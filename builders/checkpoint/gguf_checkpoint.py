"""A GGUF in one file or in parts; its quantised tensors leave as float32."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.config.gguf_metadata import from_gguf, unknown_gguf_keys
from deepseek_triton.builders.checkpoint.config.sampling import gguf_sampling
from deepseek_triton.builders.checkpoint.digest import TensorDigest
from deepseek_triton.builders.checkpoint.files.gguf_parts import check_parts, gguf_files
from deepseek_triton.builders.checkpoint.files.gguf_tensors import decoder_tensors
from deepseek_triton.builders.checkpoint.files.missing import FETCH_AGAIN, open_file
from deepseek_triton.builders.checkpoint.files.unused_tensors import is_unused
from deepseek_triton.builders.checkpoint.quantized.gguf_blocks import (
    READERS,
    IntegerBlocks,
    StoredBlocks,
    integer_blocks,
)
from deepseek_triton.builders.checkpoint.rotary_rows import halves_from_pairs, rotary_modules
from deepseek_triton.builders.checkpoint.tensor_checks import check_tensors, naming_file
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.part import Rotary
from deepseek_triton.ensemble.text.errors import one_line

Array = NDArray[Any]
ROPE_FREQUENCIES = "rope_freqs.weight"
_CONVERT_AGAIN = "convert the model to GGUF again, with a llama.cpp of today"
# First bytes of a file that is whole and isn't what is read here → what it is, and the way out.
OTHER_STARTS = {
    **dict.fromkeys((b"lmgg", b"fmgg", b"tjgg", b"algg"), f"llama.cpp's format of before GGUF; {_CONVERT_AGAIN}"),
    b"GGUF\x01\0\0\0": f"a GGUF of version 1; {_CONVERT_AGAIN}",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    **dict.fromkeys((b"<!DOCTYP", b"<!doctyp", b"<html"), "an HTML page, not the file; download the file itself"),
}


class GGUFCheckpoint:
    """One GGUF; path: its file, any of its parts, or the directory of a single one."""

    fp8 = None
    block_fp8 = None
    adapter: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        files = gguf_files(path)
        opened = [_opened(file) for file in files]
        self._reader, metadata = opened[0]
        tensors: dict[str, Any] = {}
        for file, (reader, _) in zip(files, opened, strict=True):
            for tensor in reader.tensors:
                if tensor.name in tensors:
                    raise CheckpointError(f"{file}: {tensor.name!r} is in another part too; {FETCH_AGAIN}")
                tensors[tensor.name] = tensor
        check_parts(files, [values for _, values in opened], len(tensors))
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(f"{path} has no token_embd.weight [vocab, hidden]: not a language model, or corrupt")
        frequencies = tensors.pop(ROPE_FREQUENCIES, None)
        with naming_file(path):
            self.spec = from_gguf(
                metadata,
                tensors,
                vocab_size=int(embedding.shape[1]),
                frequency_factors=() if frequencies is None else tuple(map(float, frequencies.data.reshape(-1))),
            )
        with naming_file(path):
            self.sampling = gguf_sampling(metadata)
        self.notes = unknown_gguf_keys(metadata)
        self._interleaved = self._interleaved_rows()
        used = {name: tensor for name, tensor in tensors.items() if not is_unused(name, tuple(tensor.shape))}
        self._tensors = decoder_tensors(self.spec, used)
        check_tensors(self.spec, {name: tensor.shape for name, tensor in self._tensors.items()}, path)
        self._digest = TensorDigest()

    def _interleaved_rows(self) -> dict[str, Rotary]:
        """Modules whose rows lie in llama.cpp's order (it rotates neighbouring channels)."""
        if not ARCHITECTURES[self.spec.architecture].gguf_interleaves_heads:
            return {}
        return rotary_modules(self.spec)

    def read(self, name: str) -> Array:
        with naming_file(self.path):
            array = self._tensors[name].read(name, is_swapped=self._reader.byte_order == "S")
        rotary = self._interleaved.get(name.rpartition(".")[0])
        if rotary is not None:
            array = halves_from_pairs(array, rotary)
        self._digest.add(name, array)
        return array

    @property
    def blocks(self) -> StoredBlocks | None:
        """See Checkpoint."""
        modules = frozenset(
            name.removesuffix(".weight")
            for name, tensor in self._tensors.items()
            if name.endswith(".weight") and tensor.kind in READERS
        )
        return StoredBlocks(modules, self._read_blocks) if modules else None

    def _read_blocks(self, module: str) -> IntegerBlocks:
        name = f"{module}.weight"
        tensor = self._tensors[name]
        data = tensor.data(is_swapped=self._reader.byte_order == "S")
        self._digest.add(name, data)
        blocks = integer_blocks(tensor.kind, data, tensor.shape)
        rotary = self._interleaved.get(module)
        if rotary is None:
            return blocks
        return blocks.rows(halves_from_pairs(np.arange(tensor.shape[0])[:, None], rotary)[:, 0])

    def stored_dtype(self, name: str) -> str:
        """See Checkpoint."""
        own = str(self._tensors[name].stored.tensor_type.name)
        return own if own in ("F32", "F16", "BF16") else "F16"

    def reopened(self) -> GGUFCheckpoint:
        """See Checkpoint."""
        again = GGUFCheckpoint(self.path)
        again.spec = self.spec
        return again

    def write_tokenizer(self, directory: Path) -> None:
        from deepseek_triton.builders.checkpoint.tokenizer.gguf_tokenizer import write_tokenizer

        write_tokenizer(self._reader, directory)

    def digest(self) -> str:
        return self._digest.hexdigest()


def _opened(file: Path) -> tuple[Any, dict[str, Any]]:
    """One file's reader and its metadata.

    Raises:
        CheckpointError: it isn't there, or is no readable GGUF.
        UnsupportedError: it is another format, or one of GGUF's first versions.
    """
    with open_file(file) as stream:
        start = stream.read(8)
    for sign, what in OTHER_STARTS.items():
        if start.startswith(sign):
            raise UnsupportedError(f"{file} is {what}")
    try:
        reader = strict_reader(file)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises whatever its parsing met: IndexError, KeyError, …
        raise CheckpointError(f"{file} is not a readable GGUF file ({one_line(error)}); {FETCH_AGAIN}") from error


def strict_reader(path: Path) -> Any:
    """gguf's reader, but it refuses a file that ends too early, and reads the values of an array together."""
    import gguf

    array_type, string_type = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING

    class StrictReader(gguf.gguf_reader.GGUFReader):  # type: ignore[misc]  # gguf is untyped
        """Ends where the file ends: gguf's own goes on, 2⁶⁴ times if an array's length says so."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> Any:
            array = super()._get(offset, dtype, count, *args, **options)
            if len(array) != int(count):
                raise ValueError(_ends_before(int(offset) + int(count) * np.dtype(dtype).itemsize))
            return array

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            """Read an array of strings or numbers; gguf's own makes a NumPy array for each value, which takes seconds.

            Returns the field's bytes, its parts, which parts are values, and its types, as gguf's own does; but an
            array of numbers is one part.
            """
            parts: tuple[int, list[Any], list[int], list[Any]]
            item_type = self._get(orig_offs, np.uint32) if raw_type == array_type else [None]
            dtype = self.gguf_scalar_to_np.get(item_type[0])
            if dtype is None and item_type[0] != string_type:
                parts = super()._get_field_parts(orig_offs, raw_type)
                return parts
            length = self._get(orig_offs + 4, np.uint64)
            start, types = orig_offs + 12, [array_type, gguf.GGUFValueType(item_type[0])]
            if dtype is not None:
                numbers = self._get(start, dtype, length[0])
                return 12 + numbers.nbytes, [item_type, length, numbers], [2], types
            order = np.dtype(np.uint64).newbyteorder(self.byte_order).str[0]
            strings = _strings(memoryview(self.data), int(start), int(length[0]), struct.Struct(order + "Q"))
            num_bytes = 12 + sum(8 + string.nbytes for string in strings)
            return num_bytes, [item_type, length, *strings], [*range(2, 2 + len(strings))], types

    return StrictReader(str(path))


def _strings(content: memoryview, offset: int, count: int, length: struct.Struct) -> list[memoryview]:
    """`count` strings from `offset` on: each is a `length` and so many bytes.

    Raises:
        ValueError: the content ends before the last one does.
    """
    strings = []
    for _ in range(count):
        start = offset + length.size
        if start > len(content):
            raise ValueError(_ends_before(start))
        offset = start + length.unpack_from(content, offset)[0]
        if offset > len(content):
            raise ValueError(_ends_before(offset))
        strings.append(content[start:offset])
    return strings


def _ends_before(offset: int) -> str:
    return f"it ends before byte {offset}"
