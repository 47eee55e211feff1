"""A strict, lazy stream of a checkpoint's tensors.

What enters is a Hugging Face directory or a GGUF file; what leaves is its ModelSpec and, one at a time, arrays under
Hugging Face's names. A missing, unexpected or mis-shaped tensor is an error before the first weight is read.
One tensor is in memory at a time: nothing here holds on to what it returned.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.spec import ModelSpec, from_gguf, from_hf
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.text.errors import one_line

Array = NDArray[Any]

SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
# DeepSeek's FP8 checkpoints: each 128 × 128 block of a weight has a factor, in a tensor of the weight's name and this.
SCALE_SUFFIX = "_scale_inv"
SCALE_BLOCK = 128
# Buffers that older checkpoints carry and every graph recomputes.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FETCH_AGAIN = "fetch the checkpoint again"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


class Checkpoint(Protocol):
    """Where weights come from: its spec, one tensor by name, its tokenizer, and what identifies it."""

    path: Path
    spec: ModelSpec

    def read(self, name: str) -> Array:
        """The tensor called `name` in Hugging Face's naming; linear layers are [out, in]."""

    def write_tokenizer(self, directory: Path) -> None:
        """Put tokenizer.json, and what else the tokenizer needs, into `directory`."""

    def digest(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor read so far, in order of reading."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file and check that it is complete.

    Raises:
        CheckpointError: something is missing, unreadable, unexpected or of the wrong shape.
        UnsupportedError: the architecture, an option or a dtype has no implementation here.
    """
    path = Path(path)
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if path.is_file() and path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if path.exists():
        raise CheckpointError(f"{path} is neither a Hugging Face directory nor a .gguf file")
    raise CheckpointError(f"{path} does not exist; give a Hugging Face directory or a .gguf file")


@dataclass(frozen=True)
class TensorLocation:
    """Where one tensor's bytes are: file, dtype, shape, byte offset and length."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    length: int


class HuggingFaceCheckpoint:
    """config.json, safetensors in one or many shards, tokenizer.json; block-scaled FP8 weights leave as float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config, generation = path / "config.json", path / "generation_config.json"
        with _naming(config):
            self.spec = from_hf(_read_json(config), _read_json(generation) if generation.exists() else None)
        self._tensors: dict[str, TensorLocation] = {}
        for file in _shards(path):
            for name, location in read_safetensors_header(file).items():
                if name in self._tensors:
                    other = self._tensors[name].file.name
                    raise CheckpointError(f"{path}: {name!r} is in both {other} and {file.name}; {FETCH_AGAIN}")
                self._tensors[name] = location
        scales = {name for name in self._tensors if name.endswith(SCALE_SUFFIX)}
        found = {name: location.shape for name, location in self._tensors.items() if name not in scales}
        _check_tensors(self.spec, found, path)
        _check_scales(self._tensors, scales, path)
        self._digest = hashlib.sha256()

    def read(self, name: str) -> Array:
        array = self._stored(name)
        if array.dtype != SAFETENSORS_DTYPES["F8_E4M3"]:
            return array
        return dequantize_blocks(array, self._stored(name + SCALE_SUFFIX))

    def _stored(self, name: str) -> Array:
        location = self._tensors[name]
        try:
            with location.file.open("rb") as stream:
                stream.seek(location.offset)
                # Read, not mapped: mapped pages would count as this process's memory until the kernel drops them.
                array = np.fromfile(stream, dtype=np.uint8, count=location.length)
        except OSError as error:
            raise CheckpointError(f"{location.file}: {error.strerror}; {FETCH_AGAIN}") from error
        if array.size != location.length:
            raise CheckpointError(f"{location.file} ends inside {name}; {FETCH_AGAIN}")
        array = array.view(location.dtype).reshape(location.shape)
        _update_digest(self._digest, name, array)
        return array

    def write_tokenizer(self, directory: Path) -> None:
        if not (self.path / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{self.path / 'tokenizer.json'} does not exist; convert the tokenizer with transformers' "
                "save_pretrained"
            )
        for name in TOKENIZER_FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, directory / name)

    def digest(self) -> str:
        return self._digest.hexdigest()


def read_safetensors_header(file: Path) -> dict[str, TensorLocation]:
    """Every tensor's place in one safetensors file, checked against the file's size.

    Source: https://github.com/huggingface/safetensors#format
    """
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


def dequantize_blocks(codes: Array, scales: Array) -> NDArray[np.float32]:
    """Codes [out, in] times the factor of each 128 × 128 block, scales [out / 128, in / 128] rounded up → float32.

    Source: `weight_dequant` of DeepSeek-V3's inference/kernel.py.
    """
    values = np.empty(codes.shape, np.float32)
    for block, factors in enumerate(np.asarray(scales, np.float32)):
        rows = slice(block * SCALE_BLOCK, (block + 1) * SCALE_BLOCK)
        columns = np.repeat(factors, SCALE_BLOCK)[: codes.shape[1]]
        np.multiply(codes[rows].astype(np.float32), columns, out=values[rows])
    return values


def _check_scales(tensors: Mapping[str, TensorLocation], scales: set[str], path: Path) -> None:
    """Every FP8 weight has its factors, of the right shape, and no other tensor has any."""
    fp8 = {name for name, tensor in tensors.items() if tensor.dtype == SAFETENSORS_DTYPES["F8_E4M3"]}
    for name in sorted({name.removesuffix(SCALE_SUFFIX) for name in scales} - fp8):
        raise CheckpointError(f"{path}: {name + SCALE_SUFFIX!r} belongs to no FP8 weight; {FETCH_AGAIN}")
    for name in sorted(fp8):
        if name + SCALE_SUFFIX not in scales:
            raise CheckpointError(f"{path}: {name!r} is FP8 and {name + SCALE_SUFFIX} is missing; {FETCH_AGAIN}")
        expected = tuple(-(-n // SCALE_BLOCK) for n in tensors[name].shape)
        found = tensors[name + SCALE_SUFFIX].shape
        if len(expected) != 2 or found != expected:
            raise CheckpointError(
                f"{path}: {name + SCALE_SUFFIX} has shape {list(found)}, {list(expected)} is needed for blocks of "
                f"{SCALE_BLOCK} × {SCALE_BLOCK}; {FETCH_AGAIN}"
            )


# GGUF's tensor names in Hugging Face's; {i} is the layer.
GGUF_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.attn_q_norm": "model.layers.{i}.self_attn.q_norm",
    "blk.{i}.attn_k_norm": "model.layers.{i}.self_attn.k_norm",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
ROPE_FREQUENCIES = "rope_freqs.weight"


class GGUFCheckpoint:
    """One GGUF file; its quantised tensors leave as float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = _gguf_reader(path)
            metadata = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:  # the reader raises whatever its parsing met: IndexError, KeyError, …
            raise CheckpointError(f"{path} is not a readable GGUF file ({one_line(error)}); {FETCH_AGAIN}") from error
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(f"{path} has no token_embd.weight [vocab, hidden]: not a language model, or corrupt")
        frequencies = tensors.pop(ROPE_FREQUENCIES, None)
        with _naming(path):
            self.spec = from_gguf(
                metadata,
                tensors,
                vocab_size=int(embedding.shape[1]),
                frequency_factors=() if frequencies is None else tuple(map(float, frequencies.data.reshape(-1))),
            )
        self._permuted = self._permuted_heads()
        names = self._names()
        self._tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
        found = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        _check_tensors(self.spec, found, path)
        self._digest = hashlib.sha256()

    def _names(self) -> dict[str, str]:
        pairs = [
            (gguf_name.format(i=i), name.format(i=i))
            for gguf_name, name in GGUF_TENSORS.items()
            for i in (range(self.spec.num_layers) if "{i}" in gguf_name else (0,))
        ]
        return {f"{old}.{kind}": f"{new}.{kind}" for old, new in pairs for kind in ("weight", "bias")}

    def _permuted_heads(self) -> dict[str, int]:
        # llama.cpp rotates neighbouring channels, Hugging Face halves: llama's q and k rows lie permuted in GGUF.
        if self.spec.architecture != "llama":
            return {}
        return {"self_attn.q_proj": self.spec.num_heads, "self_attn.k_proj": self.spec.num_kv_heads}

    def read(self, name: str) -> Array:
        import gguf

        tensor = self._tensors[name]
        try:
            with np.errstate(all="ignore"):  # whether weights are finite is checked where they are written
                array: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedError(f"{self.path}: {name} has type {tensor.tensor_type.name}: {error}") from error
        array = array.reshape([int(n) for n in reversed(tensor.shape)])
        for module, heads in self._permuted.items():
            if f".{module}." in name:
                halves = array.reshape(heads, self.spec.head_dim // 2, 2, -1).swapaxes(1, 2)
                array = halves.reshape(array.shape)
        _update_digest(self._digest, name, array)
        return array

    def write_tokenizer(self, directory: Path) -> None:
        from deepseek_triton.builders.checkpoint.gguf_tokenizer import write_tokenizer

        write_tokenizer(self._reader, directory)

    def digest(self) -> str:
        return self._digest.hexdigest()


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Put the file at fault before a message that doesn't name it."""
    try:
        yield
    except (CheckpointError, UnsupportedError) as error:
        if str(file.parent) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error


def _gguf_reader(path: Path) -> Any:
    import gguf

    class StrictReader(gguf.GGUFReader):  # type: ignore[misc]  # gguf is untyped
        """Ends where the file ends: gguf's own goes on, 2⁶⁴ times if an array's length says so."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> Any:
            array = super()._get(offset, dtype, count, *args, **options)
            if len(array) != int(count):
                raise ValueError(f"it ends before byte {int(offset) + int(count) * np.dtype(dtype).itemsize}")
            return array

    return StrictReader(str(path))


def _check_tensors(spec: ModelSpec, found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    expected = spec.tensor_shapes()
    # A tied head may be stored all the same.
    tied = {"lm_head.weight"} if spec.tie_word_embeddings else set()
    problems: list[tuple[str, Callable[[str], str]]] = []
    problems += [(name, lambda n: f"{n} is missing") for name in expected if name not in found]
    problems += [
        (name, lambda n: f"{n!r} is not part of a {spec.architecture} model with this configuration")
        for name in found
        if name not in expected and name not in tied
    ]
    problems += [
        (name, lambda n: f"{n} has shape {list(found[n])}, expected {list(expected[n])}")
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        name, describe = problems[0]
        more = f" (and {len(problems) - 1} more tensors)" if len(problems) > 1 else ""
        raise CheckpointError(f"{path}: {describe(name)}{more}; {FETCH_AGAIN}, or correct its configuration")


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; {FETCH_AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); {FETCH_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object; {FETCH_AGAIN}")
    return value


def _update_digest(digest: Any, name: str, array: Array) -> None:
    digest.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).data)
