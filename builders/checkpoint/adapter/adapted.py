"""A checkpoint with a LoRA adapter merged into its weights, tensor by tensor as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.adapter.lora import Adapter
from deepseek_triton.builders.checkpoint.adapter.lora_config import MERGE
from deepseek_triton.builders.checkpoint.files.hub_cache import model_name
from deepseek_triton.builders.checkpoint.files.safetensors import TensorLocation, read_bytes
from deepseek_triton.builders.checkpoint.rotary_rows import halves_from_pairs, rotary_modules
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from deepseek_triton.builders.checkpoint.reader import Checkpoint

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class AdaptedCheckpoint:
    """`base` with `adapter`: the same names and shapes, other weights; FP8 layers leave as float32.

    An adapter of the embedding or the head of a model that ties them gives it two: each is what it was trained to.

    Raises:
        CheckpointError, UnsupportedError: the adapter doesn't fit the base; the message names the tensor.
    """

    fp8 = None
    block_fp8 = None
    blocks = None

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self.path, self.sampling = base.path, base.sampling
        changed = {*adapter.layers, *(name.rpartition(".")[0] for name in adapter.replaced)}
        self.spec = base.spec
        if base.spec.tie_word_embeddings and changed & {EMBEDDING, HEAD}:
            self.spec = replace(base.spec, tie_word_embeddings=False)
        self._check()
        is_interleaved = self.spec.latent is not None and self.spec.latent.is_interleaved
        self._interleaved = rotary_modules(self.spec) if is_interleaved else {}
        self.notes = (*base.notes, *self._notes())
        name = model_name(adapter.path)
        self.adapter: Mapping[str, str] = {"name": name, "base": adapter.config.base, "sha256": adapter.sha256()}

    def _check(self) -> None:
        """Does every tensor of the adapter fit a tensor of the base?"""
        path, shapes = self._adapter.path, self.spec.tensor_shapes()
        for module, parts in self._adapter.layers.items():
            shape = shapes.get(f"{module}.weight")
            if shape is None or len(shape) != 2:
                raise CheckpointError(
                    f"{path}: {module!r} is no layer of a {self.spec.architecture} model with this configuration"
                )
            if ("embedding_a" in parts) != (module == EMBEDDING):
                raise UnsupportedError(f"{path}: {module} has an adapter of another kind of layer; {MERGE}")
            rank = self._adapter.config.rank_of(module)
            rows, columns = shape
            if module == EMBEDDING:
                expected = {"embedding_a": (rank, rows), "embedding_b": (columns, rank)}
            else:
                expected = {"a": (rank, columns), "b": (rows, rank)}
            for part, needed in expected.items():
                if parts[part].shape != needed:
                    raise CheckpointError(
                        f"{path}: the adapter of {module} has shape {list(parts[part].shape)}, {list(needed)} is "
                        f"needed for rank {rank} on a layer of {list(shape)}: trained on another model"
                    )
            if "magnitude" in parts and parts["magnitude"].shape not in ((rows,), (rows, 1), (1, rows)):
                raise CheckpointError(f"{path}: the magnitude of {module} has shape {list(parts['magnitude'].shape)}")
            if "bias" in parts and shapes.get(f"{module}.bias") != parts["bias"].shape:
                raise CheckpointError(f"{path}: the adapter of {module} has a bias, the layer has none of its shape")
        for name, tensor in self._adapter.replaced.items():
            if name not in shapes:
                raise CheckpointError(f"{path}: {name!r} is not part of the model")
            if tensor.shape != shapes[name]:
                raise UnsupportedError(
                    f"{path}: {name} has shape {list(tensor.shape)}, the model's is {list(shapes[name])}: an adapter "
                    f"that changes the vocabulary; {MERGE}, with its tokenizer"
                )

    def _notes(self) -> tuple[str, ...]:
        """What may be a mistake of the user's, one line each."""
        notes = []
        trained_on, given = self._adapter.config.base, model_name(self.path)
        names = [Path(name).name.removesuffix(".gguf").casefold() for name in (trained_on, given)]
        if names[0] != names[1]:
            named = f"trained on {trained_on}" if trained_on else "trained on a model that it doesn't name"
            notes.append(
                f"{self._adapter.path} was {named}; the checkpoint is {given}: its shapes fit, make sure that it "
                "is the same model"
            )
        if any(self._adapter.path.glob("tokenizer*.json")):
            notes.append(f"{self._adapter.path} holds a tokenizer; the checkpoint's own is used")
        return tuple(notes)

    def read(self, name: str) -> NDArray[Any]:
        """See Checkpoint."""
        rotary = self._interleaved.get(name.rpartition(".")[0])
        if name in self._adapter.replaced:
            values = _read(name, self._adapter.replaced[name])
            values = values if rotary is None else halves_from_pairs(values, rotary)
        elif name == f"{HEAD}.weight" and self._base.spec.tie_word_embeddings:
            values = self._base.read(f"{EMBEDDING}.weight")
        else:
            values = self._base.read(name)
        return self._adapter.merged(name, values, rotary)

    def stored_dtype(self, name: str) -> str:
        """See Checkpoint."""
        if name == f"{HEAD}.weight" and self._base.spec.tie_word_embeddings:
            name = f"{EMBEDDING}.weight"
        return self._base.stored_dtype(name)

    def reopened(self) -> AdaptedCheckpoint:
        """See Checkpoint."""
        again = AdaptedCheckpoint(self._base.reopened(), self._adapter)
        again.spec = self.spec
        return again

    def write_tokenizer(self, directory: Path) -> None:
        """See Checkpoint."""
        self._base.write_tokenizer(directory)

    def digest(self) -> str:
        """Of the base's tensors alone; the adapter's own is in `adapter`."""
        return self._base.digest()


def _read(name: str, tensor: TensorLocation) -> NDArray[Any]:
    return read_bytes(name, tensor).view(tensor.dtype).reshape(tensor.shape)
