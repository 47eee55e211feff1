"""Random checkpoints of every architecture, as transformers and its earlier releases write them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import bias_experts

DTYPES = ("float32", "float32", "bfloat16", "float16")
HEAD_DIMS = (2, 4, 8, 16, 24, 32)


@dataclass(frozen=True)
class Drawn:
    """config: arguments of transformers' configuration. style: which release's keys config.json has.

    has_own_head: a tied checkpoint that stores a head all the same, one of its own. dropped: keys that config.json
    leaves to their defaults. lengths: of the prompts to compare, in tokens.
    """

    model_type: str
    config: dict[str, Any]
    style: str
    dtype: str
    has_own_head: bool
    dropped: tuple[str, ...]
    lengths: tuple[int, ...]


def draw(seed: int) -> Drawn:
    """The checkpoint of one seed."""
    rng = random.Random(seed)
    model_type = rng.choice(("llama", "qwen2", "qwen3"))
    num_kv_heads = rng.choice((1, 1, 2, 3))
    num_heads = num_kv_heads * rng.choice((1, 2, 3))
    # Where the hidden size is no multiple of the heads, transformers' llama refuses the configuration.
    hidden_size = num_heads * rng.choice((2, 4, 6, 8, 16))
    config: dict[str, Any] = {
        "vocab_size": rng.randint(258, 400),
        "hidden_size": hidden_size,
        "intermediate_size": rng.randint(1, 70),
        "num_hidden_layers": rng.randint(1, 4),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": rng.choice((16, 48, 64, 100, 256)),
        "rms_norm_eps": rng.choice((1e-6, 1e-5, 1e-3)),
        "tie_word_embeddings": rng.random() < 0.4,
        "initializer_range": rng.choice((0.05, 0.1, 0.3)),
    }
    if model_type == "qwen3" or rng.random() < 0.4:
        config["head_dim"] = rng.choice(HEAD_DIMS)
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = rng.random() < 0.3
    if model_type == "llama":
        config["mlp_bias"] = rng.random() < 0.3
    else:
        config |= _windows(rng, config)
    ends = rng.choice((None, 257, [256, 257], [257]))
    config |= {"eos_token_id": ends, "bos_token_id": rng.choice((None, 256)), "pad_token_id": rng.choice((None, 257))}
    rope = _rope(rng, config["max_position_embeddings"])
    config["rope_parameters"] = rope
    if rope["rope_type"] == "dynamic" and config.get("head_dim", hidden_size // num_heads) == 2:
        config["head_dim"] = 4  # dynamic scaling isn't defined for less
    dropped = ["initializer_range"]
    if "head_dim" in config and config["head_dim"] * num_heads == hidden_size and model_type != "qwen3":
        dropped.append("head_dim")
    if not config["tie_word_embeddings"]:
        dropped.append("tie_word_embeddings")
    if config["rms_norm_eps"] == 1e-6:
        dropped.append("rms_norm_eps")
    if config["num_key_value_heads"] == num_heads and model_type == "llama":
        dropped.append("num_key_value_heads")
    longest = _longest(config)
    return Drawn(
        model_type,
        config,
        style=rng.choice(("transformers 5", "transformers 4", "type", "both")),
        dtype=rng.choice(DTYPES),
        has_own_head=config["tie_word_embeddings"] and rng.random() < 0.4,
        dropped=tuple(key for key in dropped if rng.random() < 0.5),
        lengths=(rng.randint(2, longest), longest),
    )


def draw_latent(seed: int) -> Drawn:
    """The checkpoint of one seed with latent attention and experts.

    transformers takes even sizes alone for what stands beside rotary channels.
    """
    rng = random.Random(seed)
    model_type = rng.choice(("deepseek_v2", "deepseek_v3", "deepseek_v32"))
    num_heads, num_layers = rng.choice((1, 2, 3, 4)), rng.randint(1, 3)
    num_groups = rng.choice((1, 2, 4))
    topk_group = rng.randint(1, num_groups)
    per_group = rng.randint(2, 4)
    config: dict[str, Any] = {
        "vocab_size": rng.randint(258, 400),
        "hidden_size": num_heads * rng.choice((4, 8, 16)),
        "intermediate_size": rng.randint(1, 70),
        "moe_intermediate_size": rng.randint(1, 40),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "q_lora_rank": rng.choice((None, 4, 16)),
        "kv_lora_rank": rng.choice((4, 8, 32)),
        "qk_nope_head_dim": rng.choice((2, 4, 16)),
        "qk_rope_head_dim": rng.choice((2, 4, 8, 16)),
        "v_head_dim": rng.choice((1, 6, 16)),
        "n_routed_experts": num_groups * per_group,
        "num_experts_per_tok": rng.randint(1, topk_group * per_group),
        "n_shared_experts": rng.randint(1, 2),
        "first_k_dense_replace": rng.randint(0, num_layers),
        "routed_scaling_factor": rng.choice((1.0, 2.5, 16.0)),
        "max_position_embeddings": rng.choice((16, 48, 100)),
        "rms_norm_eps": rng.choice((1e-6, 1e-5, 1e-3)),
        "tie_word_embeddings": rng.random() < 0.2,
        "attention_bias": rng.random() < 0.3,
        "initializer_range": rng.choice((0.05, 0.1, 0.3)),
        "eos_token_id": 257,
    }
    if model_type != "deepseek_v2" or rng.random() < 0.5:
        config |= {"n_group": num_groups, "topk_group": topk_group}
    if model_type == "deepseek_v3":
        config |= {"rope_interleave": rng.random() < 0.7, "norm_topk_prob": rng.random() < 0.7}
    if model_type == "deepseek_v32":
        config |= _indexer(rng, config)
    elif model_type == "deepseek_v2" and "n_group" in config:
        config["topk_method"] = "group_limited_greedy"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": round(10 ** rng.uniform(1.5, 5), 2)}
    if rng.random() < 0.6:
        rope |= {"rope_type": "yarn", "factor": rng.choice((1.0, 4.0, 40.0))}
        rope["original_max_position_embeddings"] = rng.choice((8, 16))
        for key in ("mscale", "mscale_all_dim"):
            if rng.random() < 0.7:
                rope[key] = rng.choice((0.707, 1.0))
    config["rope_parameters"] = rope
    longest = _longest(config)
    return Drawn(
        model_type,
        config,
        style=rng.choice(("transformers 5", "transformers 4", "type", "both")),
        dtype=rng.choice(DTYPES),
        has_own_head=False,
        dropped=tuple(key for key in ("initializer_range",) if rng.random() < 0.5),
        lengths=(rng.randint(2, longest), longest),
    )


def _indexer(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """An indexer that chooses from most prompts; of many heads, so that no two positions score the same."""
    return {
        "q_lora_rank": config["q_lora_rank"] or 8,
        "index_n_heads": rng.choice((16, 24, 32)),
        "index_head_dim": config["qk_rope_head_dim"] + rng.choice((0, 2, 16)),
        "index_topk": rng.choice((4, 12, 40)),
        "norm_topk_prob": rng.random() < 0.7,
    }


def _longest(config: dict[str, Any]) -> int:
    """The longest prompt to compare, in tokens: of the model's own length, or of that to which yarn stretches it."""
    longest, rope = config["max_position_embeddings"], config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        longest = max(longest, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return int(min(longest, 120))


def write(drawn: Drawn, directory: Path, seed: int) -> Path:
    """Write the checkpoint into `directory`, with random weights in which every bias and norm counts."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(drawn.model_type, **_copied(drawn.config))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    bias_experts(model)
    shard = "5GB" if seed % 4 else "20KB"
    model.to(getattr(torch, drawn.dtype)).save_pretrained(directory, max_shard_size=shard)
    if drawn.has_own_head:
        _add_head(directory, seed)
    file = directory / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(_in_style(values, drawn)), encoding="utf-8")
    return directory


def _copied(config: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(config))  # transformers changes what it is given
    return copied


def _windows(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """Sliding windows that no layer uses."""
    layers = config["num_hidden_layers"]
    return rng.choice(
        (
            {},
            {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": layers},
            {"use_sliding_window": True, "sliding_window": 16384, "max_window_layers": 0},
        )
    )


def _rope(rng: random.Random, max_positions: int) -> dict[str, Any]:
    kind = rng.choice(("default", "linear", "dynamic", "llama3", "yarn", "yarn"))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": round(10 ** rng.uniform(1.5, 7), 2)}
    if kind == "default":
        return rope
    rope["factor"] = rng.choice((1.0, 1.5, 2.0, 4.0, 8.0, 40.0))
    if kind == "llama3":
        low = rng.choice((0.5, 1.0, 2.0))
        rope |= {
            "low_freq_factor": low,
            "high_freq_factor": low * rng.choice((1.5, 4.0)),
            "original_max_position_embeddings": rng.choice((8, 16, 64)),
        }
    if kind == "yarn":
        rope["original_max_position_embeddings"] = rng.choice((8, 16, max_positions, max_positions))
        for key, values in {
            "beta_fast": (16.0, 32.0), "beta_slow": (0.5, 1.0), "attention_factor": (0.5, 1.3), "mscale": (0.7, 1.0),
            "mscale_all_dim": (0.7, 1.0), "truncate": (False, True),
        }.items():  # fmt: skip
            if rng.random() < 0.3:
                rope[key] = rng.choice(values)
    return rope


def _in_style(values: dict[str, Any], drawn: Drawn) -> dict[str, Any]:
    """config.json with the keys of one of transformers' releases; what it says stays the same."""
    values = {key: value for key, value in values.items() if key not in drawn.dropped}
    rope = values["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if drawn.style == "transformers 5":
        return values
    if drawn.style == "both":  # scaling that a user adds to a file of transformers 5
        plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        return {**values, "rope_parameters": plain, "rope_scaling": dict(rope)}
    if drawn.style == "type":
        scaling["type"] = scaling.pop("rope_type")
    del values["rope_parameters"]
    return {**values, "rope_theta": rope["rope_theta"], "rope_scaling": None if len(scaling) == 1 else scaling}


def _add_head(directory: Path, seed: int) -> None:
    """Store a head that isn't the embedding, in the file that holds the embedding."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        if (embedding := tensors.get("model.embed_tokens.weight")) is None:
            continue
        generator = torch.Generator().manual_seed(seed)
        head = torch.randn(embedding.shape, generator=generator) * 0.2
        tensors["lm_head.weight"] = head.to(embedding.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
        index = directory / "model.safetensors.index.json"
        if index.exists():
            listed = json.loads(index.read_text(encoding="utf-8"))
            listed["weight_map"]["lm_head.weight"] = file.name
            index.write_text(json.dumps(listed), encoding="utf-8")
