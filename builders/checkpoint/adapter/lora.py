"""A LoRA adapter: two thin matrices for each adapted layer, and whole tensors that replace the base's.

Source: Hu et al., arXiv 2106.09685; DoRA: Liu et al., arXiv 2402.09353. Names are peft's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.adapter.lora_config import MERGE, LoraConfig, read_lora_config
from deepseek_triton.builders.checkpoint.files.missing import open_file, reason_missing
from deepseek_triton.builders.checkpoint.files.safetensors import (
    WEIGHT_DTYPES,
    TensorLocation,
    check_dtype,
    read_bytes,
    read_safetensors_header,
)
from deepseek_triton.builders.checkpoint.files.unused_tensors import with_prefix
from deepseek_triton.builders.checkpoint.rotary_rows import halves_from_pairs
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.part import Rotary

Float32 = NDArray[np.float32]
PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
# What peft or a trainer puts into a name beside the module's own.
WRAPPERS = (".modules_to_save.default", ".modules_to_save", ".base_layer", ".default")
# The end of a tensor's name → the part of a layer's adapter that it is.
PARTS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_B.bias": "bias", ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b", ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
PAIRS = ({"a", "b"}, {"embedding_a", "embedding_b"})


@dataclass(frozen=True)
class Adapter:
    """config: its ranks. layers: module → part → tensor. replaced: name in the base → tensor that takes its place."""

    path: Path
    config: LoraConfig
    layers: Mapping[str, Mapping[str, TensorLocation]]
    replaced: Mapping[str, TensorLocation] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Open the adapter in directory `path`; every tensor is known, and each layer has both its matrices.

        Raises:
            CheckpointError: something is missing or damaged.
            UnsupportedError: it is of another method than LoRA or DoRA.
        """
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; give the directory of a LoRA adapter")
        config = read_lora_config(path)
        file = path / WEIGHTS
        if not file.exists() and (path / "adapter_model.bin").exists():
            raise UnsupportedError(
                f"{path / 'adapter_model.bin'} is a pickle, which can run code when it is loaded; save the adapter "
                "again, with peft's save_pretrained"
            )
        if not file.exists():
            raise CheckpointError(reason_missing(file))
        layers: dict[str, dict[str, TensorLocation]] = {}
        replaced = {}
        for stored, tensor in read_safetensors_header(file).items():
            check_dtype(stored, tensor, WEIGHT_DTYPES[:3])
            name = _plain(stored)
            suffix = next((suffix for suffix in PARTS if name.endswith(suffix)), None)
            if suffix is not None:
                layers.setdefault(name.removesuffix(suffix), {})[PARTS[suffix]] = tensor
            elif "lora_" in name:
                raise UnsupportedError(f"{file}: {stored!r} is of no LoRA that is known here; {MERGE}")
            else:
                replaced[name] = tensor
        _check_pairs(file, layers, config)
        if not layers and not replaced:
            raise CheckpointError(f"{file} holds no tensor of an adapter")
        return cls(path, config, layers, replaced)

    def sha256(self) -> str:
        """Of the file of its weights."""
        digest = sha256()
        with open_file(self.path / WEIGHTS) as stream:
            while block := stream.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def merged(self, name: str, values: NDArray[Any], rotary: Rotary | None = None) -> NDArray[Any]:
        """The base's tensor `name` with what the adapter adds to it; float32 where it adds something.

        rotary: of a layer whose rows `values` has in this project's order, and the adapter as pairs of neighbours.
        """
        module, _, kind = name.rpartition(".")
        layer = self.layers.get(module)
        if layer is None or (kind == "bias" and "bias" not in layer):
            return values
        parts = layer

        def rows(part: str) -> Float32:
            stored = read_float32(parts[part])
            return stored if rotary is None else halves_from_pairs(stored.reshape(len(values), -1), rotary)

        base, scaling = np.asarray(values, np.float32), np.float32(self.config.scaling_of(module))
        if kind == "bias":
            return base + scaling * rows("bias").reshape(-1)
        if "embedding_a" in layer:  # an embedding is [vocab, hidden]: its adapter lies the other way round
            product = read_float32(layer["embedding_b"]) @ read_float32(layer["embedding_a"])
            return base + scaling * product.T
        merged: Float32 = base + scaling * (rows("b") @ read_float32(layer["a"]))
        if "magnitude" in layer:
            length = np.sqrt(np.einsum("ij,ij->i", merged, merged, dtype=np.float64)).astype(np.float32)
            merged *= (rows("magnitude").reshape(-1) / length)[:, None]
        return merged


def read_float32(tensor: TensorLocation) -> Float32:
    """A tensor of the adapter."""
    array = read_bytes(tensor.file.name, tensor).view(tensor.dtype).reshape(tensor.shape)
    return np.asarray(array, np.float32)


def _plain(stored: str) -> str:
    """The name in the base of what `stored` belongs to, with the part of an adapter that it is."""
    name = stored.removeprefix(PREFIX)
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return with_prefix(name)


def _check_pairs(file: Path, layers: Mapping[str, Mapping[str, TensorLocation]], config: LoraConfig) -> None:
    for module, parts in layers.items():
        pair = next((pair for pair in PAIRS if pair <= set(parts)), None)
        if pair is None:
            raise CheckpointError(f"{file}: {module} has only {', '.join(sorted(parts))} of a LoRA's two matrices")
        if config.uses_dora != ("magnitude" in parts):
            what = "is missing" if config.uses_dora else "is there"
            raise CheckpointError(f"{file}: use_dora is {config.uses_dora}, and the magnitude of {module} {what}")
        if "magnitude" in parts and "embedding_a" in parts:
            raise UnsupportedError(f"{file}: {module} is an embedding with DoRA: not supported; {MERGE}")
