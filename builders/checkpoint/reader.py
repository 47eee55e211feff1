"""A strict, lazy stream of a checkpoint's tensors.

What enters is a Hugging Face directory or a GGUF file; what leaves is its ModelSpec and, one at a time, arrays under
Hugging Face's names. A missing, unexpected or mis-shaped tensor is an error before the first weight is read.
One tensor is in memory at a time: nothing here holds on to what it returned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.gguf_checkpoint import GGUFCheckpoint
from deepseek_triton.builders.checkpoint.hugging_face import HuggingFaceCheckpoint
from deepseek_triton.builders.errors import CheckpointError
from deepseek_triton.ensemble.decoder.spec import ModelSpec

Array = NDArray[Any]


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
