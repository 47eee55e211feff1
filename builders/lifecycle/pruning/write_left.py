"""What is left of a checkpoint → a Hugging Face checkpoint: config.json, safetensors, tokenizer.

A whole checkpoint is the case that nothing is removed: a GGUF or an FP8 one becomes what transformers loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.config.sampling import GENERATION
from deepseek_triton.builders.checkpoint.config.to_hf import changed_config, config_from_spec
from deepseek_triton.builders.checkpoint.files.write import most_common_dtype, write_checkpoint
from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.checkpoint.rotary_rows import pairs_from_halves, rotary_modules
from deepseek_triton.builders.checkpoint.tensor_checks import read_json
from deepseek_triton.builders.fp8.calibrate import Report
from deepseek_triton.builders.lifecycle.pruning.choose import Choice
from deepseek_triton.builders.lifecycle.pruning.kept import Kept
from deepseek_triton.builders.lifecycle.pruning.options import DTYPES
from deepseek_triton.ensemble.artefacts.tensor_file import TensorEntry
from deepseek_triton.ensemble.decoder.spec import ModelSpec


def whole(spec: ModelSpec) -> Choice:
    """The choice that removes nothing."""
    return Choice(Kept(tuple(range(spec.num_layers))))


def write_left(
    checkpoint: Checkpoint,
    choice: Choice,
    directory: Path,
    dtype: str | None = None,
    report: Report = lambda what, done, total: None,
) -> None:
    """Write what `choice` keeps of the checkpoint into `directory`: weights, configuration and tokenizer.

    dtype: of the weights, by torch's name; None: the checkpoint's own.

    Raises:
        BuildError: the checkpoint can't be read, or has no configuration in Hugging Face's terms.
    """
    left = choice.kept.spec(checkpoint.spec)
    entries: dict[str, TensorEntry] = {}
    shapes = left.tensor_shapes()
    for name in checkpoint.spec.tensor_shapes():
        if (new_name := choice.kept.new_name(name)) is not None:
            kind = DTYPES[dtype] if dtype else checkpoint.stored_dtype(name)
            entries[new_name] = TensorEntry(kind, shapes[new_name])
    common = most_common_dtype(entries)
    config_file = checkpoint.path / "config.json"
    if checkpoint.path.is_dir() and config_file.exists():
        config = changed_config(read_json(config_file), left, choice.kept.layers, common)
    else:
        config = config_from_spec(left, common)
    write_checkpoint(directory, config, entries, _tensors(checkpoint, choice, left, report))
    checkpoint.write_tokenizer(directory)
    generation = _generation(checkpoint, left)
    if generation:
        (directory / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _tensors(
    checkpoint: Checkpoint, choice: Choice, left: ModelSpec, report: Report
) -> Iterator[tuple[str, NDArray[Any]]]:
    """What is left of each tensor, in the checkpoint's own order of rotary channels; all are read, for the digest."""
    rotary = rotary_modules(left) if left.latent is not None and left.latent.is_interleaved else {}
    names = list(checkpoint.spec.tensor_shapes())
    for index, name in enumerate(names):
        report("write", index, len(names))
        array = checkpoint.read(name)
        if (new_name := choice.kept.new_name(name)) is None:
            continue
        refitted = choice.refitted.get(name)
        array = choice.kept.sliced(checkpoint.spec, name, array) if refitted is None else refitted()
        module = new_name.rpartition(".")[0]
        yield new_name, pairs_from_halves(array, rotary[module]) if module in rotary else array
    report("write", len(names), len(names))


def _generation(checkpoint: Checkpoint, left: ModelSpec) -> Mapping[str, Any]:
    """generation_config.json: the checkpoint's own, or what a GGUF proposes."""
    own = checkpoint.path / GENERATION
    if checkpoint.path.is_dir() and own.exists():
        return read_json(own)
    if not checkpoint.sampling:
        return {}
    proposed = {key: int(value) if key == "top_k" else value for key, value in checkpoint.sampling.items()}
    samples = {"do_sample": True} if "temperature" in proposed else {}
    return {**samples, **proposed, "eos_token_id": list(left.eos_token_ids)}
