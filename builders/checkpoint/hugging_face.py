"""A Hugging Face directory: config.json, safetensors in one or many shards, tokenizer files."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.block_scales import SCALE_SUFFIX, check_scales, dequantize_blocks
from deepseek_triton.builders.checkpoint.hf_config import from_hf
from deepseek_triton.builders.checkpoint.safetensors import (
    SAFETENSORS_DTYPES,
    TensorLocation,
    read_safetensors_header,
    shard_files,
)
from deepseek_triton.builders.checkpoint.tensor_checks import (
    FETCH_AGAIN,
    check_tensors,
    naming_file,
    read_json,
    update_digest,
)
from deepseek_triton.builders.errors import CheckpointError

Array = NDArray[Any]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class HuggingFaceCheckpoint:
    """config.json, safetensors in one or many shards, tokenizer.json; block-scaled FP8 weights leave as float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config, generation = path / "config.json", path / "generation_config.json"
        with naming_file(config):
            self.spec = from_hf(read_json(config), read_json(generation) if generation.exists() else None)
        self._tensors: dict[str, TensorLocation] = {}
        for file in shard_files(path):
            for name, location in read_safetensors_header(file).items():
                if name in self._tensors:
                    other = self._tensors[name].file.name
                    raise CheckpointError(f"{path}: {name!r} is in both {other} and {file.name}; {FETCH_AGAIN}")
                self._tensors[name] = location
        scales = {name for name in self._tensors if name.endswith(SCALE_SUFFIX)}
        found = {name: location.shape for name, location in self._tensors.items() if name not in scales}
        check_tensors(self.spec, found, path)
        check_scales(self._tensors, scales, path)
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
        update_digest(self._digest, name, array)
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
