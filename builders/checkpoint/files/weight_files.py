"""The files that hold a Hugging Face checkpoint's weights, and what to do with a directory that has none."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from deepseek_triton.builders.checkpoint.files.missing import FETCH_AGAIN, reason_missing
from deepseek_triton.builders.checkpoint.tensor_checks import read_json
from deepseek_triton.builders.errors import CheckpointError, UnsupportedError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
# Beside a checkpoint's weights, and none of them: Mistral's and Meta's own layout, and an adapter.
OTHER_WEIGHTS = ("consolidated", "adapter_model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Suffix → what such a file of weights is.
OTHER_FORMATS = {
    ".h5": "TensorFlow's", ".msgpack": "Flax's", ".npz": "MLX's or NumPy's", ".onnx": "an ONNX graph",
    ".ggml": "llama.cpp's, of before GGUF", ".nemo": "NeMo's", ".engine": "a TensorRT plan", ".tflite": "LiteRT's",
}  # fmt: skip


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of the checkpoint in `path`: those of its index, or all that there are.

    Raises:
        CheckpointError: one that must be there is missing.
        UnsupportedError: the weights have another format.
    """
    if (path / "adapter_config.json").exists() and any(path.glob("adapter_model.*")):
        raise UnsupportedError(_adapter_message(path))
    index = path / INDEX
    if index.exists() or index.is_symlink():
        files = [path / name for name in indexed_files(index)]
        _require(files, f"{INDEX} names")
        if (path / SINGLE).exists() and path / SINGLE not in files:  # transformers takes the one, vLLM the others
            raise CheckpointError(
                f"{path} holds {SINGLE} beside {INDEX}, which names other files: "
                "two sets of weights; remove one of them"
            )
        return files
    files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith(OTHER_WEIGHTS))
    if not files:
        raise _no_weights(path)
    _require(_all_shards(files), "their names count")
    return files


def indexed_files(index: Path) -> list[str]:
    """The names of the files that an index of weights names.

    Raises:
        CheckpointError: it is damaged, or names files elsewhere.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; {FETCH_AGAIN}")
    names = weight_map.values()
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{index}: weight_map must name files beside it; {FETCH_AGAIN}")
    return sorted(set(names))


def _all_shards(files: Sequence[Path]) -> list[Path]:
    """`files`, and those that the names of `model-00001-of-00003.safetensors` and its like count besides."""
    found = set(files)
    for file in files:
        if shard := SHARD.fullmatch(file.name):
            stem, _, count = shard.groups()
            found |= {file.with_name(f"{stem}-{i + 1:05}-of-{count}.safetensors") for i in range(int(count))}
    return sorted(found)


def _require(files: Sequence[Path], who: str) -> None:
    missing = [file for file in files if not file.exists()]
    if missing:
        others = f" ({len(missing)} of the {len(files)} files that {who} are missing)" if len(files) > 1 else ""
        raise CheckpointError(reason_missing(missing[0]) + others)


def _no_weights(path: Path) -> Exception:
    files = sorted(file for file in path.iterdir() if file.is_file() or file.is_symlink())
    for file in files:
        if file.suffix in PICKLES and not file.name.startswith(("training_args", "optimizer", "scheduler", "rng_")):
            return UnsupportedError(pickle_message(file))
    for file in files:
        if file.suffix in OTHER_FORMATS:
            return UnsupportedError(
                f"{path} holds no .safetensors file; {file.name} is {OTHER_FORMATS[file.suffix]}, which is not read: "
                "give a checkpoint in safetensors or GGUF"
            )
    return CheckpointError(
        f"{path} holds no .safetensors file; fetch them, or convert the weights with save_pretrained"
    )


def _adapter_message(path: Path) -> str:
    if all(file.name.startswith(OTHER_WEIGHTS) for file in path.glob("*.safetensors")):
        return f"{path} is an adapter, not a model: build the model that it was trained on, with --adapter {path}"
    return f"{path} holds a model and an adapter; move the adapter_ files to a directory of their own"


def pickle_message(file: Path) -> str:
    """What to do with pickled weights."""
    directory = str(file.parent)
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f'M.from_pretrained("{directory}", dtype="auto").save_pretrained("{directory}-safetensors")'
    )
    return (
        f"{file} is a pickle, which can run code when it is loaded: only safetensors and GGUF are read; convert it, "
        f"if you trust it, with: {shlex.join(['python', '-c', code])}"
    )
