"""A Hugging Face directory of safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.config.deepseek import V3, V32
from deepseek_triton.builders.checkpoint.config.hf_config import from_hf, unknown_config_keys, with_ends
from deepseek_triton.builders.checkpoint.config.sampling import GENERATION, hf_sampling, unknown_generation_keys
from deepseek_triton.builders.checkpoint.config.values import count
from deepseek_triton.builders.checkpoint.digest import TensorDigest
from deepseek_triton.builders.checkpoint.files.safetensors import (
    SCALE_DTYPES,
    WEIGHT_DTYPES,
    TensorLocation,
    check_dtype,
    read_bytes,
    read_safetensors_header,
)
from deepseek_triton.builders.checkpoint.files.tied_head import with_stored_head
from deepseek_triton.builders.checkpoint.files.unused_tensors import is_unused, with_prefix
from deepseek_triton.builders.checkpoint.files.weight_files import shard_files
from deepseek_triton.builders.checkpoint.quantized.refused import refuse_by_names
from deepseek_triton.builders.checkpoint.quantized.scales import (
    Fp8Weight,
    checked_scale,
    dequantize_blocks,
    fp8_modules,
)
from deepseek_triton.builders.checkpoint.quantized.scheme import fp8_scheme
from deepseek_triton.builders.checkpoint.quantized.scheme_keys import unknown_scheme_keys
from deepseek_triton.builders.checkpoint.quantized.stored import StoredFp8
from deepseek_triton.builders.checkpoint.rotary_rows import halves_from_pairs, rotary_modules
from deepseek_triton.builders.checkpoint.tensor_checks import (
    check_tensors,
    naming_file,
    read_json,
)
from deepseek_triton.builders.checkpoint.tokenizer.hf_tokenizer import copy_tokenizer, unknown_tokenizer_keys
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.artefacts.cuda_layout import BLOCK_COLUMNS
from deepseek_triton.ensemble.decoder.spec import layer_prefix

Array = NDArray[Any]


class HuggingFaceCheckpoint:
    """config.json, safetensors in one or many shards, tokenizer.json; FP8 weights leave as float32, or as they are."""

    blocks = None
    adapter: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        config, generation = path / "config.json", path / GENERATION
        is_proposing = generation.exists() or generation.is_symlink()
        values, proposed = read_json(config), read_json(generation) if is_proposing else {}
        with naming_file(config):
            self._scheme = fp8_scheme(values)
            spec = from_hf(values)
        with naming_file(generation):
            spec = with_ends(spec, proposed)
            self.sampling = hf_sampling(proposed)
        self.notes = (
            *unknown_config_keys(values), *unknown_scheme_keys(values), *unknown_generation_keys(proposed),
            *unknown_tokenizer_keys(path),
        )  # fmt: skip
        self._tensors = _located(path)
        refuse_by_names(self._tensors, str(path))
        self.spec = with_stored_head(spec, self._tensors)
        predictors = _prediction_layers(values, self.spec.num_layers)
        if predictors:
            self.notes += (f"{len(predictors)} layers that predict further tokens are left out",)
        expected = self.spec.tensor_shapes()
        self._fp8 = fp8_modules(self._tensors, self._scheme, path)
        scales = {name for names in self._fp8.values() for name in names.companions()}
        found = {
            name: tensor.shape
            for name, tensor in self._tensors.items()
            if name not in scales
            and (name in expected or not (is_unused(name, tensor.shape) or name.startswith(predictors)))
        }
        check_tensors(self.spec, found, path)
        for name in found:
            check_dtype(name, self._tensors[name], WEIGHT_DTYPES)
        for names in self._fp8.values():
            for scale in (names.scale, names.input_scale):
                if scale:
                    check_dtype(scale, self._tensors[scale], SCALE_DTYPES)
        self._digest = TensorDigest()
        is_interleaved = self.spec.latent is not None and self.spec.latent.is_interleaved
        self._interleaved = rotary_modules(self.spec) if is_interleaved else {}

    @property
    def fp8(self) -> StoredFp8 | None:
        """See Checkpoint: where no layer's scales are for blocks."""
        if not self._fp8 or any(names.is_block for names in self._fp8.values()):
            return None
        is_per_tensor = all(np.prod(self._tensors[names.scale].shape) == 1 for names in self._fp8.values())
        return StoredFp8(frozenset(self._fp8), is_per_tensor, self._scheme.is_static, self._read_fp8)

    @property
    def block_fp8(self) -> StoredFp8 | None:
        """See Checkpoint."""
        block = self._scheme.block
        if block is None or block[1] != BLOCK_COLUMNS or not all(names.is_block for names in self._fp8.values()):
            return None
        return StoredFp8(frozenset(self._fp8), False, False, self._read_blocks) if self._fp8 else None

    def _read_blocks(self, module: str) -> Fp8Weight:
        """The scales are given for every row, so that the rows' order is free."""
        names, (rows, _) = self._fp8[module], self._scheme.block or (1, 1)
        codes, scale = self._stored(names.weight), checked_scale(names.scale, self._stored(names.scale))
        of_rows = np.repeat(scale, rows, axis=0)[: len(codes)]
        return Fp8Weight(self._reordered(module, codes), self._reordered(module, of_rows))

    def read(self, name: str) -> Array:
        """See Checkpoint."""
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in self._fp8:
            return self._reordered(module, self._stored(name))
        names = self._fp8[module]
        if not names.is_block or self._scheme.block is None:
            return self._read_fp8(module).dequantized()
        codes, scale = self._stored(names.weight), checked_scale(names.scale, self._stored(names.scale))
        return self._reordered(module, dequantize_blocks(codes, scale, self._scheme.block))

    def _reordered(self, module: str, rows: Array) -> Array:
        """The rows of a weight or bias with the rotary channels in this project's order."""
        rotary = self._interleaved.get(module)
        return rows if rotary is None else halves_from_pairs(rows, rotary)

    def _read_fp8(self, module: str) -> Fp8Weight:
        names = self._fp8[module]
        codes, scale = self._stored(names.weight), checked_scale(names.scale, self._stored(names.scale))
        input_scale = None
        if self._scheme.is_static and names.input_scale:
            input_scale = _one_number(names.input_scale, self._stored(names.input_scale))
        for zero_point in names.zero_points:
            if read_bytes(zero_point, self._tensors[zero_point]).any():
                raise UnsupportedError(f"{self.path}: {zero_point} isn't zero: asymmetric weights are not supported")
        codes = self._reordered(module, codes)
        if scale.size == 1:
            return Fp8Weight(codes, scale.reshape(()), input_scale)
        return Fp8Weight(codes, self._reordered(module, scale.reshape(-1)), input_scale)

    def _stored(self, name: str) -> Array:
        location = self._tensors[name]
        array = read_bytes(name, location).view(location.dtype).reshape(location.shape)
        self._digest.add(name, array)
        return array

    def stored_dtype(self, name: str) -> str:
        """See Checkpoint."""
        own = self._tensors[name].dtype_name
        return "BF16" if own.startswith("F8") else own

    def reopened(self) -> HuggingFaceCheckpoint:
        """See Checkpoint."""
        again = HuggingFaceCheckpoint(self.path)
        again.spec = self.spec
        return again

    def write_tokenizer(self, directory: Path) -> None:
        """See Checkpoint."""
        copy_tokenizer(self.path, directory)

    def digest(self) -> str:
        """See Checkpoint."""
        return self._digest.hexdigest()


def _located(path: Path) -> dict[str, TensorLocation]:
    """Every tensor's place, under the name that a decoder with its head has it."""
    tensors: dict[str, TensorLocation] = {}
    for file in shard_files(path):
        for stored, location in read_safetensors_header(file).items():
            name = with_prefix(stored)
            if name in tensors:
                other = tensors[name].file.name
                raise CheckpointError(f"{path}: {stored!r} is in both {other} and {file.name}; remove one of them")
            tensors[name] = location
    return tensors


def _prediction_layers(values: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    """The prefixes of DeepSeek-V3's layers for multi-token prediction, which follow the decoder's own."""
    if values["model_type"] not in (V3, V32):
        return ()
    number = count(values, "num_nextn_predict_layers", count(values, "num_mtp_layers", 0))
    return tuple(layer_prefix(num_layers + index) for index in range(number))


def _one_number(name: str, array: Array) -> float:
    if array.size != 1:
        raise UnsupportedError(f"{name} has shape {list(array.shape)}: one input scale for each layer is supported")
    value = float(checked_scale(name, array).reshape(()))
    if value == 0:
        raise CheckpointError(f"{name} is 0: the checkpoint is damaged")
    return value
