"""A strict, lazy stream of a checkpoint's tensors.

What enters is a Hugging Face directory or a GGUF file; what leaves is its ModelSpec and, one at a time, arrays under
Hugging Face's names. A missing, unexpected or mis-shaped tensor is an error before the first weight is read.
One tensor is in memory at a time: nothing here holds on to what it returned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.adapter.adapted import AdaptedCheckpoint
from deepseek_triton.builders.checkpoint.adapter.lora import Adapter
from deepseek_triton.builders.checkpoint.files.hub_cache import Snapshot, snapshot_in
from deepseek_triton.builders.checkpoint.files.missing import reason_missing
from deepseek_triton.builders.checkpoint.files.near import how_to_name, reason_for_none
from deepseek_triton.builders.checkpoint.files.weight_files import PICKLES, pickle_message
from deepseek_triton.builders.checkpoint.gguf_checkpoint import GGUFCheckpoint
from deepseek_triton.builders.checkpoint.hugging_face import HuggingFaceCheckpoint
from deepseek_triton.builders.checkpoint.quantized.gguf_blocks import StoredBlocks
from deepseek_triton.builders.checkpoint.quantized.stored import StoredFp8
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError
from deepseek_triton.ensemble.decoder.spec import ModelSpec

Array = NDArray[Any]
# A file cut into pieces of bytes by other tools than gguf-split, as model.gguf.part1of2 and model.gguf-split-a.
BYTES_OF_GGUF = re.compile(r".*\.gguf[.-](?:part|split)[-.]?\w+")


class Checkpoint(Protocol):
    """Where weights come from: its spec, one tensor by name, its tokenizer, and what identifies it.

    spec: of the decoder to be made; a build for short sequences sets it to one that needs fewer of the tensors.

    notes: a line for the user on each thing that was found and has no effect. sampling: request option → the value that
    the checkpoint proposes. adapter: what was merged into the weights, as the manifest records it; empty for nothing.
    """

    path: Path
    spec: ModelSpec
    notes: tuple[str, ...]
    sampling: dict[str, float]
    adapter: Mapping[str, str]

    @property
    def fp8(self) -> StoredFp8 | None:
        """The layers that are stored in FP8 with one scale for the weight or for each row; None: there are none."""

    @property
    def block_fp8(self) -> StoredFp8 | None:
        """The same of a checkpoint whose FP8 layers have a scale for every block of any rows and 128 columns."""

    @property
    def blocks(self) -> StoredBlocks | None:
        """The 2-D weights that are stored in blocks of integers; None: there are none."""

    def read(self, name: str) -> Array:
        """The tensor called `name` in Hugging Face's naming; linear layers are [out, in]."""

    def stored_dtype(self, name: str) -> str:
        """safetensors' name of the float dtype that holds the tensor as well as the checkpoint does, nearly.

        It is the tensor's own where that is a float's; bfloat16 for FP8, float16 for blocks of integers.
        """

    def reopened(self) -> Checkpoint:
        """The same checkpoint with the same spec, of which nothing has been read yet."""

    def write_tokenizer(self, directory: Path) -> None:
        """Put tokenizer.json, and what else the tokenizer needs, into `directory`."""

    def digest(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every tensor read so far, in order of reading."""


def open_checkpoint(path: str | Path, adapter: Path | None = None) -> Checkpoint:
    """Open a Hugging Face directory or a GGUF file and check that it is complete.

    adapter: a directory with a LoRA adapter, which is merged into the weights.

    Raises:
        CheckpointError: something is missing, unreadable, unexpected or of the wrong shape.
        UnsupportedError: the architecture, an option or a dtype has no implementation here.
    """
    if adapter is not None:
        return AdaptedCheckpoint(open_checkpoint(path), Adapter.open(snapshot_in(adapter)))
    path = snapshot_in(Path(path))
    if path.is_dir():
        return _open_directory(path)
    if path.suffix.lower() == ".gguf" and (path.is_file() or path.is_symlink()):
        return GGUFCheckpoint(path)
    if path.is_symlink():
        raise CheckpointError(reason_missing(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {how_to_name(path)}")
    if path.suffix in PICKLES:
        raise UnsupportedError(pickle_message(path))
    if BYTES_OF_GGUF.fullmatch(path.name):
        raise UnsupportedError(f"{path} is a piece of a GGUF file cut into bytes; join the pieces with cat first")
    if path.suffix == ".safetensors" or (path.parent / "config.json").exists():
        raise CheckpointError(f"{path} is one file of a checkpoint; give its directory, {path.parent}")
    raise CheckpointError(f"{path} is neither a Hugging Face directory nor a .gguf file")


def _open_directory(path: Path) -> Checkpoint:
    config = path / "config.json"
    if config.exists() or config.is_symlink():
        return HuggingFaceCheckpoint(path)
    if any(path.glob("*.gguf")):
        return GGUFCheckpoint(path)
    adapter = path / "adapter_config.json"
    if adapter.exists() or adapter.is_symlink():
        raise UnsupportedError(
            f"{path} is an adapter, not a model: build the model that it was trained on, with --adapter {path}"
        )
    if (path / "params.json").exists():
        raise UnsupportedError(
            f"{path} has params.json and no config.json: Meta's or Mistral's own layout, which is not read; give the "
            "same model in Hugging Face's"
        )
    if Snapshot.of(path) is not None or any(path.glob("*.safetensors")) or (path / ".cache").is_dir():
        return HuggingFaceCheckpoint(path)  # which says that config.json is missing, and how to get it
    raise CheckpointError(f"{path.absolute()} holds no checkpoint: {reason_for_none(path)}")
