"""A GGUF file; its quantised tensors leave as float32."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.gguf_metadata import from_gguf
from deepseek_triton.builders.checkpoint.tensor_checks import FETCH_AGAIN, check_tensors, naming_file, update_digest
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES
from deepseek_triton.ensemble.decoder.part import Linear
from deepseek_triton.ensemble.decoder.spec import layer_prefix
from deepseek_triton.ensemble.text.errors import one_line

Array = NDArray[Any]
# GGUF's names of what is outside the layers, in Hugging Face's; those of a layer's modules are the parts' own.
OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FREQUENCIES = "rope_freqs.weight"


class GGUFCheckpoint:
    """One GGUF file; its quantised tensors leave as float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = strict_reader(path)
            metadata = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:  # the reader raises whatever its parsing met: IndexError, KeyError, …
            raise CheckpointError(f"{path} is not a readable GGUF file ({one_line(error)}); {FETCH_AGAIN}") from error
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
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
        self._interleaved = self._interleaved_heads()
        names = self._names()
        self._tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
        found = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        check_tensors(self.spec, found, path)
        self._digest = hashlib.sha256()

    def _names(self) -> dict[str, str]:
        """Tensors' names in this file → Hugging Face's."""
        pairs = dict(OUTSIDE_LAYERS)
        for layer in range(self.spec.num_layers):
            modules = (module for part in self.spec.parts(layer) for module in part.modules)
            pairs |= {f"blk.{layer}.{module.gguf}": layer_prefix(layer) + module.module for module in modules}
        return {f"{old}.{kind}": f"{new}.{kind}" for old, new in pairs.items() for kind in ("weight", "bias")}

    def _interleaved_heads(self) -> dict[str, int]:
        """Modules whose rows lie in llama.cpp's order (it rotates neighbouring channels) → their number of heads."""
        if not ARCHITECTURES[self.spec.architecture].gguf_interleaves_heads:
            return {}
        layers = range(self.spec.num_layers)
        modules = (module for layer in layers for part in self.spec.parts(layer) for module in part.modules)
        return {m.module: m.rotary_heads for m in modules if isinstance(m, Linear) and m.rotary_heads}

    def read(self, name: str) -> Array:
        import gguf

        tensor = self._tensors[name]
        try:
            with np.errstate(all="ignore"):  # whether weights are finite is checked where they are written
                array: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UnsupportedError(f"{self.path}: {name} has type {tensor.tensor_type.name}: {error}") from error
        array = array.reshape([int(n) for n in reversed(tensor.shape)])
        for module, heads in self._interleaved.items():
            if f".{module}." in name:
                halves = array.reshape(heads, self.spec.head_dim // 2, 2, -1).swapaxes(1, 2)
                array = halves.reshape(array.shape)
        update_digest(self._digest, name, array)
        return array

    def write_tokenizer(self, directory: Path) -> None:
        from deepseek_triton.builders.checkpoint.gguf_tokenizer import write_tokenizer

        write_tokenizer(self._reader, directory)

    def digest(self) -> str:
        return self._digest.hexdigest()


def strict_reader(path: Path) -> Any:
    """gguf's reader, which refuses a file that ends too early."""
    import gguf

    class StrictReader(gguf.GGUFReader):  # type: ignore[misc]  # gguf is untyped
        """Ends where the file ends: gguf's own goes on, 2⁶⁴ times if an array's length says so."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **options: Any) -> Any:
            array = super()._get(offset, dtype, count, *args, **options)
            if len(array) != int(count):
                raise ValueError(f"it ends before byte {int(offset) + int(count) * np.dtype(dtype).itemsize}")
            return array

    return StrictReader(str(path))
