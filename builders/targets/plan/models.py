"""DeepSeek's published models by name: what their config.json on Hugging Face says of their shape.

Each entry names the repository below huggingface.co/deepseek-ai that the shape was taken from; `same` are the names of
others with the same shape. A checkpoint's folder or a GGUF file gives its own shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.errors import BuildError, CheckpointError
from deepseek_triton.ensemble.decoder.spec import ModelSpec

PREFIX = "deepseek-"


def _llama(hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, length: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": vocabulary,
        "max_position_embeddings": length,
    }  # fmt: skip


def _qwen2(hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int) -> dict[str, Any]:
    return {**_llama(hidden, inner, layers, heads, keys, vocabulary, 131072), "model_type": "qwen2"}


# Of every model with latent attention.
_LATENT = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_layer_freq": 1,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    },  # mscale is left out: it changes no byte and no time
}  # fmt: skip
_V2 = {**_LATENT, "model_type": "deepseek_v2", "vocab_size": 102400, "n_shared_experts": 2, "num_experts_per_tok": 6,
       "first_k_dense_replace": 1, "scoring_func": "softmax", "norm_topk_prob": False}  # fmt: skip
_V3 = {**_LATENT, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
       "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
       "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
       "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
       "routed_scaling_factor": 2.5}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published shape: config.json's values, the repository that they are from, and others with the same."""

    source: str
    config: dict[str, Any]
    same: tuple[str, ...] = ()


PUBLISHED = (
    Published("DeepSeek-LLM-7B-Chat", _llama(4096, 11008, 30, 32, 32, 102400, 4096),
              ("llm-7b", "math-7b", "coder-7b-v1.5", "prover-v1.5-7b")),
    Published("DeepSeek-LLM-67B-Chat", _llama(8192, 22016, 95, 64, 8, 102400, 4096), ("llm-67b", "67b")),
    Published("DeepSeek-Coder-1.3B-Instruct", _llama(2048, 5504, 24, 16, 16, 32256, 16384), ("coder-1.3b",)),
    Published("DeepSeek-Coder-6.7B-Instruct", _llama(4096, 11008, 32, 32, 32, 32256, 16384), ("coder-6.7b",)),
    Published("DeepSeek-Coder-33B-Instruct", _llama(7168, 19200, 62, 56, 8, 32256, 16384), ("coder-33b",)),
    Published("DeepSeek-R1-Distill-Qwen-1.5B", _qwen2(1536, 8960, 28, 12, 2, 151936)),
    Published("DeepSeek-R1-Distill-Qwen-7B", _qwen2(3584, 18944, 28, 28, 4, 152064)),
    Published("DeepSeek-R1-Distill-Qwen-14B", _qwen2(5120, 13824, 48, 40, 8, 152064)),
    Published("DeepSeek-R1-Distill-Qwen-32B", _qwen2(5120, 27648, 64, 40, 8, 152064)),
    Published("DeepSeek-R1-Distill-Llama-8B", _llama(4096, 14336, 32, 32, 8, 128256, 131072)),
    Published("DeepSeek-R1-Distill-Llama-70B", _llama(8192, 28672, 80, 64, 8, 128256, 131072)),
    Published("DeepSeek-R1-0528-Qwen3-8B",
              {**_llama(4096, 12288, 36, 32, 8, 151936, 131072), "model_type": "qwen3", "head_dim": 128}),
    Published(
        "DeepSeek-V2-Lite",
        {**_V2, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
         "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
         "n_routed_experts": 64, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0},
        ("v2-lite-chat", "coder-v2-lite", "coder-v2-lite-instruct", "coder-v2-lite-base"),
    ),
    Published(
        "DeepSeek-V2",
        {**_V2, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
         "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
         "n_routed_experts": 160, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy",
         "routed_scaling_factor": 16.0},
        ("v2-chat", "v2.5", "v2.5-1210", "coder-v2", "coder-v2-instruct", "coder-v2-base"),
    ),
    Published(
        "DeepSeek-V3",
        {**_V3, "model_type": "deepseek_v3"},
        ("v3-base", "v3-0324", "v3.1", "v3.1-base", "v3.1-terminus", "r1", "r1-zero", "r1-0528", "prover-v2-671b"),
    ),
    Published(
        "DeepSeek-V3.2-Exp",
        {**_V3, "model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
        ("v3.2", "v3.2-exp-base", "v3.2-speciale"),
    ),
)  # fmt: skip
# Models that no code here can run, and why.
OTHERS = {
    "moe-16b": "its model_type is deepseek, experts with ordinary attention",
    "v4-flash": "its attention and its connections are of another kind",
    "vl2": "it sees images",
}


def _names(published: Published) -> tuple[str, ...]:
    own = published.source.lower().removeprefix(PREFIX)
    suffixes = ("-chat", "-instruct", "-base")
    stem = next((own.removesuffix(suffix) for suffix in suffixes if own.endswith(suffix)), own)
    variants = {f"{stem}{suffix}" for suffix in suffixes} if stem != own else set()
    return tuple(dict.fromkeys([own, *sorted(variants), *published.same]))


MODELS = {f"{PREFIX}{name}": published for published in PUBLISHED for name in _names(published)}


@dataclass(frozen=True)
class PlannedModel:
    """A model, and where its shape is from."""

    name: str
    spec: ModelSpec
    source: str


Hint = Callable[[str, Iterable[str]], str]


def find_model(text: str, hint: Hint = lambda name, known: "") -> PlannedModel:
    """The model that `text` names: one of MODELS, with `deepseek-ai/` or `deepseek-` or without; a folder; a GGUF file.

    Of a folder with config.json nothing else is read, so that no weights need be there. hint: what an error adds on the
    names that there are.

    Raises:
        BuildError: no such model or file, or one that nothing here can run.
    """
    path = Path(text)
    if path.exists():
        return PlannedModel(text, _spec_of(path), str(path))
    name = PREFIX + text.lower().removeprefix("deepseek-ai/").removeprefix(PREFIX)
    if reason := OTHERS.get(name.removeprefix(PREFIX)):
        raise BuildError(f"{text} can't be planned: {reason}, which nothing here computes")
    if name not in MODELS:
        what = "is neither a DeepSeek model that is known by name nor a folder or file"
        raise BuildError(f"{text!r} {what}{hint(name, MODELS)}")
    published = MODELS[name]
    source = f"config.json of huggingface.co/deepseek-ai/{published.source}, from a table here"
    return PlannedModel(name, from_hf(published.config), source)


def _spec_of(path: Path) -> ModelSpec:
    config = path / "config.json"
    if not config.is_file():
        from deepseek_triton.builders.checkpoint.reader import open_checkpoint

        return open_checkpoint(path).spec
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{config} must hold a JSON object")
    return from_hf(values)
