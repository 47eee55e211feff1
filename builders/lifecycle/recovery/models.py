"""Checkpoints ↔ transformers' models, whole or with a LoRA adapter."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.reader import Checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.pruning.write_left import whole, write_left


def load_model(checkpoint: Checkpoint, device: str, dtype: str = "float32") -> Any:
    """transformers' model of a checkpoint, in torch's `dtype`; a GGUF or FP8 weights are dequantised on the way.

    Raises:
        BuildError: there is no room for the copy.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if checkpoint.path.is_dir() and not _is_quantised(checkpoint):
        return _load(checkpoint.path, device, dtype)
    with tempfile.TemporaryDirectory(prefix="deepseek-triton-copy-") as directory:
        try:
            write_left(checkpoint, whole(checkpoint.spec), Path(directory), "float32")
        except OSError as error:
            raise BuildError(f"{directory}: {error.strerror}; set TMPDIR to a directory with more room") from error
        return _load(Path(directory), device, dtype)


def with_lora(model: Any, rank: int) -> Any:
    """The model with a LoRA adapter on every linear layer but the head; its own weights are frozen."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft 0.21 reads a name that transformers 5.24 calls by another
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.get_peft_model(model, config)


def save_model(model: Any, source: Checkpoint, directory: Path) -> None:
    """Write the model as a checkpoint in the dtype of `source`, with its tokenizer; a LoRA adapter is merged.

    Raises:
        BuildError: the disk is full, or can't be written.
    """
    import torch
    from safetensors import SafetensorError

    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[source.stored_dtype("model.embed_tokens.weight")]
    try:
        merged.to(getattr(torch, dtype)).save_pretrained(directory)
    except SafetensorError as error:  # which is no OSError
        raise BuildError(
            f"the checkpoint can't be written: {error}; make room and run the same command again, it goes on"
        ) from error
    source.write_tokenizer(directory)


def choose_device(name: str) -> str:
    """The torch device that `name` asks for: "auto" is the GPU where torch sees one.

    Raises:
        BuildError: a GPU is asked for, and there is none.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "gpu" and not has_gpu:
        raise BuildError("device gpu: torch sees no GPU here; use --device cpu")
    return "cuda" if has_gpu and name != "cpu" else "cpu"


def _is_quantised(checkpoint: Checkpoint) -> bool:
    from deepseek_triton.builders.checkpoint.tensor_checks import read_json

    config = checkpoint.path / "config.json"
    return not config.exists() or bool(read_json(config).get("quantization_config"))


def _load(directory: Path, device: str, dtype: str) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    if device == "cpu" and hasattr(model.config, "kv_lora_rank"):  # the fast implementations take even sizes alone
        model.set_experts_implementation("eager")
        model.set_attn_implementation("eager")
    return model.to(device)
