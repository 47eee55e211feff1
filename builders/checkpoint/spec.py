"""ModelSpec: every dimension and option of a decoder-only transformer.

What enters is a Hugging Face `config.json` or GGUF metadata, what leaves is one frozen dataclass. This is the
only place that knows either's naming; nothing after it asks where a checkpoint came from.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from deepseek_triton.builders.errors import CheckpointError, UnsupportedError

RopeScaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "factors"]
MAX_WHOLE = 2**31 - 1
MAX_NUMBER = 1e30  # float32 arithmetic on anything larger would overflow
MAX_NUM_LAYERS = 1024  # far more than any model has: a corrupt file must not make billions of names


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: base frequency and how it is stretched past the trained length.

    `factor` divides frequencies (linear, llama3, yarn) or grows the base (dynamic); `original_max_position_embeddings`
    is the length the model was first trained with, in tokens. `attention_factor` multiplies cos and sin
    (yarn). `frequency_factors`, one divisor for each pair of channels, is how GGUF files carry llama3's scaling.
    Formulas: transformers' `modeling_rope_utils.py`.
    """

    theta: float = 10000.0
    scaling: RopeScaling = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    frequency_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 < self.theta < math.inf:
            raise CheckpointError(f"rope theta is {self.theta}, must be a number above 1")
        if not 1 <= self.factor < math.inf:
            raise CheckpointError(f"rope scaling factor is {self.factor}, must be a number of at least 1")
        if self.scaling in ("dynamic", "llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise CheckpointError(f"rope scaling {self.scaling!r} needs original_max_position_embeddings")
        if (self.scaling == "factors") != bool(self.frequency_factors):
            raise CheckpointError("rope frequency factors and scaling 'factors' belong together")
        if self.scaling == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise CheckpointError(
                f"low_freq_factor is {self.low_freq_factor}, must lie between 0 and high_freq_factor "
                f"{self.high_freq_factor}"
            )
        if self.scaling == "yarn" and not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise CheckpointError(f"beta_slow is {self.beta_slow}, must lie between 0 and beta_fast {self.beta_fast}")
        if not 0 < self.attention_factor < math.inf:
            raise CheckpointError(f"attention_factor is {self.attention_factor}, must be a number above 0")
        for number in self.frequency_factors:
            if not 0 < number < math.inf:
                raise CheckpointError(f"rope_freqs.weight holds {number}, must hold numbers above 0")


@dataclass(frozen=True)
class ArchitectureOptions:
    """What sets one decoder architecture apart from another: where biases are, whether q and k are normalised."""

    qkv_bias: bool = False
    qk_norm: bool = False
    reads_attention_bias: bool = True  # config.json's attention_bias means biases on q, k, v and o


# The `model_type` of config.json and the `general.architecture` of GGUF agree for these.
ARCHITECTURES: dict[str, ArchitectureOptions] = {
    "llama": ArchitectureOptions(),  # DeepSeek-LLM, DeepSeek-Coder, R1-Distill-Llama
    "qwen2": ArchitectureOptions(qkv_bias=True, reads_attention_bias=False),  # R1-Distill-Qwen
    "qwen3": ArchitectureOptions(qk_norm=True),  # R1-0528-Qwen3
}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: dimensions in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    o_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    rope: RopeSpec = field(default_factory=RopeSpec)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{name} is {value!r}, must be a positive whole number")
        if self.num_layers > MAX_NUM_LAYERS:
            raise CheckpointError(f"num_layers is {self.num_layers}, must be at most {MAX_NUM_LAYERS}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads is {self.num_heads}, must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}, must be even for rotary embedding")
        if not 0 < self.rms_norm_eps < 1:
            raise CheckpointError(f"rms_norm_eps is {self.rms_norm_eps}, must lie between 0 and 1")
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise CheckpointError(f"eos_token_id is {token}, outside the vocabulary of {self.vocab_size}")
        if self.rope.frequency_factors and len(self.rope.frequency_factors) != self.head_dim // 2:
            raise CheckpointError(
                f"rope_freqs.weight holds {len(self.rope.frequency_factors)} factors, head_dim {self.head_dim} needs "
                f"{self.head_dim // 2}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the manifest stores them."""
        return asdict(self)

    def num_parameters(self) -> int:
        """Elements in all tensors of `tensor_shapes`."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor the checkpoint must hold, Hugging Face's names, linear layers [out, in]."""
        q, kv, hidden = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.num_layers):
            layer = f"model.layers.{i}"
            linears = {
                "self_attn.q_proj": (q, hidden, self.qkv_bias),
                "self_attn.k_proj": (kv, hidden, self.qkv_bias),
                "self_attn.v_proj": (kv, hidden, self.qkv_bias),
                "self_attn.o_proj": (hidden, q, self.o_bias),
                "mlp.gate_proj": (self.intermediate_size, hidden, self.mlp_bias),
                "mlp.up_proj": (self.intermediate_size, hidden, self.mlp_bias),
                "mlp.down_proj": (hidden, self.intermediate_size, self.mlp_bias),
            }
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{layer}.{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{layer}.{name}.bias"] = (rows,)
            if self.qk_norm:
                shapes[f"{layer}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{layer}.self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def from_hf(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelSpec:
    """Read a Hugging Face `config.json`; `generation_config.json`, where there is one, names the end tokens.

    Raises:
        UnsupportedError: an architecture or option that no graph here implements.
        CheckpointError: a value that is missing or out of range.
    """
    architecture = _supported(config.get("model_type"))
    if config.get("use_sliding_window"):
        raise UnsupportedError("config.json has use_sliding_window true: sliding windows are not supported")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedError(f"config.json has hidden_act {config['hidden_act']!r}: only silu is supported")
    if _number(config, "partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError("config.json has partial_rotary_factor other than 1: not supported")

    options = ARCHITECTURES[architecture]
    attention_bias = options.reads_attention_bias and bool(config.get("attention_bias", False))
    num_heads, hidden_size = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    max_positions = _whole(config, "max_position_embeddings")
    eos = (generation_config or {}).get("eos_token_id", config.get("eos_token_id"))
    return ModelSpec(
        architecture=architecture,
        vocab_size=_whole(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_whole(config, "intermediate_size"),
        num_layers=_whole(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_whole(config, "num_key_value_heads", num_heads),
        head_dim=_whole(config, "head_dim", hidden_size // num_heads),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=options.qkv_bias or attention_bias,
        qk_norm=options.qk_norm,
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        eos_token_ids=_token_ids(eos if isinstance(eos, list) else [eos]),
        rope=_rope_from_hf(config, max_positions),
    )


def _rope_from_hf(config: Mapping[str, Any], max_positions: int) -> RopeSpec:
    # transformers 5 writes rope_parameters, earlier releases rope_theta beside rope_scaling.
    parameters: Any = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"the rope parameters are {parameters!r}, must be a JSON object")
    theta = _number(parameters, "rope_theta", _number(config, "rope_theta", 10000.0))
    kind: Any = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in get_args(RopeScaling) or kind == "factors":
        raise UnsupportedError(
            f"rope scaling {kind!r} is not supported; supported: default, linear, dynamic, llama3, yarn"
        )
    if kind == "default":
        return RopeSpec(theta=theta)
    original = _whole(parameters, "original_max_position_embeddings", max_positions)
    original = _whole(config, "original_max_position_embeddings", original)
    # DeepSeek's yarn configurations may say the two lengths instead of their ratio.
    factor = _number(parameters, "factor", max_positions / original if kind == "yarn" else None)
    if kind == "llama3":
        return RopeSpec(
            theta, kind, factor, original,
            low_freq_factor=_number(parameters, "low_freq_factor"),
            high_freq_factor=_number(parameters, "high_freq_factor"),
        )  # fmt: skip
    if kind == "yarn":
        return RopeSpec(
            theta, kind, factor, original,
            beta_fast=_number(parameters, "beta_fast", 32.0),
            beta_slow=_number(parameters, "beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(parameters, factor),
            truncate=bool(parameters.get("truncate", True)),
        )  # fmt: skip
    # Dynamic scaling begins where max_position_embeddings ends, whatever the original length was.
    return RopeSpec(theta, kind, factor, max_positions)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(_number(parameters, "mscale")) / mscale(_number(parameters, "mscale_all_dim"))
    # R1-0528-Qwen3-8B carries attn_factor = 1 / mscale(1): a multiplier on top, as vLLM reads it. transformers ignores
    # the key and comes out 1.14 times too high in cos and sin.
    return mscale(1.0) * _number(parameters, "attn_factor", 1.0)


def from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Container[str],
    *,
    vocab_size: int,
    frequency_factors: tuple[float, ...] = (),
) -> ModelSpec:
    """Read GGUF metadata (key → plain value).

    Args:
        metadata: the file's key-value pairs.
        tensor_names: names of the file's tensors; GGUF says by them which biases and which head there are.
        vocab_size: rows of `token_embd.weight`; the metadata key is optional in the format.
        frequency_factors: the tensor `rope_freqs.weight`, where the file has it.
    """
    architecture = _supported(metadata.get("general.architecture"))

    values = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    options = ARCHITECTURES[architecture]
    num_heads, hidden_size = _whole(values, "attention.head_count"), _whole(values, "embedding_length")
    head_dim = _whole(values, "attention.key_length", hidden_size // num_heads)
    for key in ("rope.dimension_count", "attention.value_length"):
        if _whole(values, key, head_dim) != head_dim:
            raise UnsupportedError(f"the GGUF has {key} {values[key]}, other than a head's {head_dim}: not supported")
    max_positions = _whole(values, "context_length")
    eos = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_whole(values, "feed_forward_length"),
        num_layers=_whole(values, "block_count"),
        num_heads=num_heads,
        num_kv_heads=_whole(values, "attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=_number(values, "attention.layer_norm_rms_epsilon"),
        max_position_embeddings=max_positions,
        tie_word_embeddings="output.weight" not in tensor_names,
        qkv_bias=options.qkv_bias or "blk.0.attn_q.bias" in tensor_names,
        qk_norm=options.qk_norm,
        o_bias="blk.0.attn_output.bias" in tensor_names,
        mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
        eos_token_ids=_token_ids(eos),
        rope=_rope_from_gguf(values, max_positions, frequency_factors),
    )


def _rope_from_gguf(values: Mapping[str, Any], max_positions: int, frequency_factors: tuple[float, ...]) -> RopeSpec:
    kind = values.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"rope scaling {kind!r} is not supported in GGUF; supported: none, linear, yarn")
    theta = _number(values, "rope.freq_base", 10000.0)
    if frequency_factors:
        return RopeSpec(theta, "factors", frequency_factors=frequency_factors)
    if kind == "none":
        return RopeSpec(theta)
    factor = _number(values, "rope.scaling.factor")
    if kind == "linear":
        return RopeSpec(theta, "linear", factor)
    return RopeSpec(
        theta, "yarn", factor, _whole(values, "rope.scaling.original_context_length", max_positions),
        beta_fast=_number(values, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_number(values, "rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=_yarn_attention_factor({"attn_factor": values.get("rope.scaling.attn_factor")}, factor),
    )  # fmt: skip


def _supported(architecture: object) -> str:
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    return architecture


def _whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; without a default it must be there (null is as good as absent)."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{key} is missing from the checkpoint's configuration; fetch the checkpoint again")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{key} is {value!r}, must be a positive whole number")
    if value > MAX_WHOLE:
        raise CheckpointError(f"{key} is {value}, must be at most {MAX_WHOLE}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{key} is missing from the checkpoint's configuration; fetch the checkpoint again")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MAX_NUMBER:
        raise CheckpointError(f"{key} is {value!r}, must be a number")
    return float(value)


def _token_ids(values: list[Any]) -> tuple[int, ...]:
    """Each id once, in order; None is none."""
    for value in values:
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise CheckpointError(f"eos_token_id is {value!r}, must be a token id")
    return tuple(dict.fromkeys(value for value in values if value is not None))
