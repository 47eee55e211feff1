"""The parts' declarations, compared with transformers' models and with the mathematics in NumPy."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deepseek_triton.builders.checkpoint.config.hf_config import from_hf
from deepseek_triton.builders.fp8.forward.layer_session import runnable_opset
from deepseek_triton.builders.fp8.recipe import Recipe
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.targets.artefacts.decoder_shape import decoder_shape
from deepseek_triton.ensemble.artefacts.cuda_split import ShardedDecoder
from deepseek_triton.ensemble.decoder.architectures import ARCHITECTURES, Architecture, dense_layer
from deepseek_triton.ensemble.decoder.dense_mlp import DenseMlp
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.mla import LatentAttention
from deepseek_triton.ensemble.decoder.moe import MixtureOfExperts
from deepseek_triton.ensemble.decoder.options import ExpertOptions, LatentOptions
from deepseek_triton.ensemble.decoder.part import (
    CacheTensor,
    Linear,
    Norm,
    Part,
    Plain,
    Rotary,
    Shard,
    Split,
    fused_shape,
)
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from tests.support.checkpoints import LATENT_OPTIONS, LATENT_SMALL, OPTIONS, SMALL

Array = NDArray[Any]
RANDOM = np.random.default_rng(0)

PARTS: dict[str, Part] = {
    "attention": GroupedQueryAttention(32, num_heads=8, num_kv_heads=2, head_dim=4),
    "attention, a key head each": GroupedQueryAttention(32, num_heads=8, num_kv_heads=8, head_dim=4),
    "attention, biases and norms": GroupedQueryAttention(24, 4, 4, 6, qkv_bias=True, o_bias=True, qk_norm=True),
    "mlp": DenseMlp(32, 64),
    "mlp, biases": DenseMlp(24, 128, has_bias=True),
}


def spec_of(option: str, **changes: Any) -> ModelSpec:
    base, (model_type, values) = (
        (SMALL, OPTIONS[option]) if option in OPTIONS else (LATENT_SMALL, LATENT_OPTIONS[option])
    )
    return from_hf({"model_type": model_type, **base, **values, **changes})


def named(part: Part) -> list[Norm | Linear]:
    """Its norms and linear layers."""
    return [module for module in part.modules if not isinstance(module, Plain)]


# ---- tensors


@pytest.mark.parametrize("option", OPTIONS)
def test_the_tensors_are_those_of_transformers(option: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model_type, changes = OPTIONS[option]
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **changes})
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert spec_of(option).tensor_shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("option", ["llama-biases", "llama-mha-tied", "qwen2", "qwen3", "v2-groups", "v2-lite", "v3"])
def test_the_graph_reads_them_in_the_declared_order(option: str, tmp_path: Path) -> None:
    spec, names = spec_of(option), []

    def read(name: str) -> Array:
        names.append(name)
        return np.zeros(spec.tensor_shapes()[name], np.float32)

    build_graph(spec, read, tmp_path, max_seq_len=8)
    assert names == list(spec.tensor_shapes())


# ---- linear layers


@pytest.mark.parametrize("name", PARTS)
def test_each_linear_layer_is_in_one_matrix_reads_one_value_and_may_be_fp8(name: str) -> None:
    part = PARTS[name]
    linears = {module.module: module for module in part.modules if isinstance(module, Linear)}
    assert [module for matrix in part.fused.values() for module in matrix] == list(linears)
    assert [module for tap in part.taps for module in tap.modules] == list(linears)
    for modules in [*part.fused.values(), *(tap.modules for tap in part.taps)]:
        assert len({linears[module].in_features for module in modules}) == 1
    assert isinstance(part.modules[0], Norm), "the norm before a part comes first"
    for module in named(part):
        is_linear = isinstance(module, Linear)
        assert Recipe().precision_of(f"model.layers.7.{module.module}") == ("fp8" if is_linear else "network")


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate", "mlp.gate_proj"])
def test_other_modules_keep_the_networks_precision(module: str) -> None:
    assert Recipe().precision_of(module) == "network"


@pytest.mark.parametrize("name", PARTS)
def test_a_tap_has_the_channels_of_its_producer(name: str) -> None:
    part = PARTS[name]
    modules = {module.module: module for module in named(part)}
    for tap in part.taps:
        if tap.producer is None:
            continue
        producer, reader = modules[tap.producer], modules[tap.modules[0]]
        assert isinstance(reader, Linear)
        width = producer.size if isinstance(producer, Norm) else producer.out_features
        shared = part.shared_channels(tap.value)
        if shared is not None:
            assert shared.num_groups * shared.width == width
            width *= shared.num_repeats
        assert width == reader.in_features


def test_fused_matrices_and_rotary_heads() -> None:
    attention = PARTS["attention"]
    assert fused_shape(attention, "qkv") == (8 * 4 + 2 * 2 * 4, 32)
    assert fused_shape(attention, "o") == (32, 8 * 4)
    linears = [module for module in attention.modules if isinstance(module, Linear)]
    assert [linear.rotary for linear in linears] == [Rotary(8, 4, 0, 4), Rotary(2, 4, 0, 4), None, None]
    assert [fused_shape(PARTS["mlp"], matrix) for matrix in ("gate_up", "down")] == [(128, 32), (32, 64)]


# ---- caches


@pytest.mark.parametrize(
    ("changes", "elements"),
    [
        ({"num_hidden_layers": 28, "num_key_value_heads": 4, "head_dim": 128}, 28_672),  # R1-Distill-Qwen-7B
        ({"num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128}, 65_536),  # R1-Distill-Llama-8B
        ({"num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128}, 73_728),  # R1-0528-Qwen3-8B
    ],
)
def test_the_elements_of_a_token_in_the_caches(changes: dict[str, int], elements: int) -> None:
    spec = spec_of("qwen2", num_attention_heads=32, **changes)
    assert spec.cache_elements() == elements
    assert decoder_shape(spec, 100).cache_bytes(3) == 3 * 100 * elements * 2  # bfloat16
    attention, mlp = spec.parts(0)
    heads = changes["num_key_value_heads"]
    assert attention.cache == (CacheTensor("key", heads, 128), CacheTensor("value", heads, 128)) and mlp.cache == ()


# ---- shards


def sharded(whole: Array, shard: Shard) -> Array:
    if shard.matrices is not None:
        return np.stack([sharded(matrix, replace(shard, matrices=None)) for matrix in whole[shard.matrices]])
    rows = whole if shard.rows is None else np.concatenate([whole[rows] for rows in shard.rows])
    return rows if shard.columns is None else rows[:, shard.columns]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", PARTS)
def test_shards_have_the_sharded_parts_shapes_and_cover_the_whole(name: str, size: int) -> None:
    part = PARTS[name]
    split = Split(size)
    assert part.reason_against(split) is None
    own = part.sharded(split, 0)
    for matrix in part.fused:
        shape = fused_shape(part, matrix)
        whole = np.arange(math.prod(shape)).reshape(shape)
        shards = [part.shard(matrix, "weight", rank, split) for rank in range(size)]
        pieces = [sharded(whole, shard) for shard in shards]
        assert {piece.shape for piece in pieces} == {fused_shape(own, matrix)}
        assert {shard.shape(shape) for shard in shards} == {fused_shape(own, matrix)}
        assert set(np.concatenate([piece.reshape(-1) for piece in pieces])) == set(whole.reshape(-1))
        for rank, piece in enumerate(pieces):  # a scale and a bias for each row
            rows = sharded(np.arange(shape[0]), part.shard(matrix, "scale", rank, split))
            assert np.array_equal(rows, sharded(np.arange(shape[0]), part.shard(matrix, "bias", rank, split)))
            assert len(rows) == len(piece)


def mlp_output(part: Part, gate_up: Array, down: Array, x: Array) -> Array:
    gate, up = np.split(x @ gate_up.T, 2, axis=1)
    output: Array = (gate / (1 + np.exp(-gate)) * up) @ down.T
    return output


def attention_output(part: GroupedQueryAttention, qkv: Array, o: Array, x: Array) -> Array:
    """Without rotary embedding."""
    heads = (x @ qkv.T).reshape(len(x), -1, part.head_dim).swapaxes(0, 1)
    q, k, v = np.split(heads, [part.num_heads, part.num_heads + part.num_kv_heads])
    k, v = (np.repeat(each, part.num_heads // part.num_kv_heads, axis=0) for each in (k, v))
    scores = q @ k.swapaxes(1, 2) + np.where(np.tri(len(x)), 0, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    attended = (weights / weights.sum(axis=2, keepdims=True)) @ v
    output: Array = attended.swapaxes(0, 1).reshape(len(x), -1) @ o.T
    return output


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", ["attention", "attention, a key head each", "mlp, biases"])
def test_the_ranks_outputs_add_up_to_the_whole(name: str, size: int) -> None:
    part: Any = PARTS[name]
    output: Any = mlp_output if isinstance(part, DenseMlp) else attention_output
    matrices = [RANDOM.normal(size=fused_shape(part, matrix)) for matrix in part.fused]
    x = RANDOM.normal(size=(5, part.hidden_size))
    total = np.zeros_like(x)
    for rank in range(size):
        shards = [part.shard(matrix, "weight", rank, Split(size)) for matrix in part.fused]
        total += output(part.sharded(Split(size), rank), *map(sharded, matrices, shards), x)
    np.testing.assert_allclose(total, output(part, *matrices, x))


LATENT = LatentOptions(q_lora_rank=None, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
EXPERTS = ExpertOptions(
    num_experts=8, num_experts_per_tok=2, intermediate_size=32, num_shared_experts=2, first_dense_layers=0,
    scores="softmax", choice="greedy",
)  # fmt: skip
LATENT_PARTS: dict[str, Part] = {
    "one query matrix": LatentAttention(16, 4, LATENT),
    "two query matrices": LatentAttention(16, 4, replace(LATENT, q_lora_rank=8)),
    "experts": MixtureOfExperts(16, EXPERTS),
    "without shared experts": MixtureOfExperts(16, replace(EXPERTS, num_shared_experts=0)),
}
SPLITS = [Split(2), Split(4), Split(2, 2), Split(1, 2), Split(4, 2), Split(1, 4)]


@pytest.mark.parametrize("split", SPLITS, ids=lambda split: f"{split.tensor_size}-{split.expert_size}")
@pytest.mark.parametrize("name", LATENT_PARTS)
def test_the_ranks_of_latents_and_experts_have_the_sharded_parts_shapes(name: str, split: Split) -> None:
    part = LATENT_PARTS[name]
    assert part.reason_against(split) is None
    own = [part.sharded(split, rank) for rank in range(split.size)]
    for matrix in (*part.fused, *part.stacked):
        shape = fused_shape(part, matrix)
        whole = np.arange(math.prod(shape)).reshape(shape)
        shards = [part.shard(matrix, "weight", rank, split) for rank in range(split.size)]
        pieces = [sharded(whole, shard) for shard in shards]
        assert [piece.shape for piece in pieces] == [fused_shape(of_rank, matrix) for of_rank in own]
        assert [shard.shape(shape) for shard in shards] == [piece.shape for piece in pieces]
        assert set(np.concatenate([piece.reshape(-1) for piece in pieces])) == set(whole.reshape(-1))
        for rank, piece in enumerate(pieces):  # a scale for each row
            scales = whole[..., 0]
            found = sharded(scales, part.shard(matrix, "scale", rank, split))
            assert found.shape == piece.shape[:-1] == part.shard(matrix, "scale", rank, split).shape(scales.shape)


def latent_output(part: LatentAttention, x: Array, **matrices: Array) -> Array:
    """Without rotary embedding and inner norms, each head's keys and values made from the latent."""
    options, heads = part.options, part.num_heads
    first = x @ matrices["q_kv_a"].T
    column = part.query.out_features if options.q_lora_rank is None else options.q_lora_rank
    queries, latent, key = np.split(first, [column, column + options.kv_lora_rank], axis=1)
    if options.q_lora_rank is not None:
        queries = queries @ matrices["q_b"].T
    made = (latent @ matrices["kv_b"].T).reshape(len(x), heads, -1)
    keys = np.concatenate([made[..., : options.qk_nope_head_dim], np.repeat(key[:, None], heads, axis=1)], axis=2)
    values = made[..., options.qk_nope_head_dim :]
    scores = np.einsum("qhd,khd->hqk", queries.reshape(len(x), heads, -1), keys)
    weights = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
    output: Array = np.einsum("hqk,khd->qhd", weights, values).reshape(len(x), -1) @ matrices["o"].T
    return output


def experts_output(part: MixtureOfExperts, x: Array, **matrices: Array) -> Array:
    """Every expert computes every token, with a weight of its own."""
    own = zip(part.experts, matrices["experts_gate_up"], matrices["experts_down"], strict=True)
    total = sum((1 + expert) * mlp_output(part, gate_up, down, x) for expert, gate_up, down in own)
    output: Array = total + mlp_output(part, matrices["shared_gate_up"], matrices["shared_down"], x)
    return output


@pytest.mark.parametrize("split", [Split(2), Split(4), Split(2, 2), Split(1, 2), Split(4, 2)], ids=str)
@pytest.mark.parametrize("name", ["one query matrix", "two query matrices", "experts"])
def test_the_ranks_of_latents_and_experts_add_up_to_the_whole(name: str, split: Split) -> None:
    part: Any = LATENT_PARTS[name]
    output: Any = experts_output if name == "experts" else latent_output
    size = split.size if name == "experts" else split.tensor_size
    matrices = {matrix: 0.3 * RANDOM.normal(size=fused_shape(part, matrix)) for matrix in (*part.fused, *part.stacked)}
    x = RANDOM.normal(size=(5, part.hidden_size))
    total = np.zeros_like(x)
    for rank in range(size):
        own = {matrix: sharded(whole, part.shard(matrix, "weight", rank, split)) for matrix, whole in matrices.items()}
        total += output(part.sharded(split, rank), x, **own)
    np.testing.assert_allclose(total, output(part, x, **matrices))


@pytest.mark.parametrize(
    ("part", "size", "reason"),
    [
        (PARTS["attention"], 3, "8 query heads can't be shared out evenly"),
        (
            GroupedQueryAttention(32, num_heads=12, num_kv_heads=3, head_dim=4),
            2,
            "3 key heads can't be shared out evenly",
        ),
        (PARTS["attention"], 8, None),  # four ranks have the same key head
        (PARTS["mlp"], 3, "intermediate_size 64 can't be shared out evenly"),
        (PARTS["mlp"], 8, "each rank's part of intermediate_size is 8, must be a multiple of 16"),
        (DenseMlp(32, 8), 1, None),
        (LATENT_PARTS["one query matrix"], 3, "4 heads can't be shared out evenly"),
        (LATENT_PARTS["experts"], 5, "the experts' intermediate_size 32 can't be shared out evenly"),
    ],
)
def test_what_cannot_be_sharded_is_told(part: Part, size: int, reason: str | None) -> None:
    assert part.reason_against(Split(size)) == reason


def test_a_rank_s_decoder_has_its_parts_dimensions() -> None:
    shape = decoder_shape(spec_of("llama", intermediate_size=128), 16)
    own = ShardedDecoder(shape, 1, 2).shape
    assert own.kinds == tuple(part.sharded(Split(2), 1) for part in shape.kinds)
    changed = {name for name, value in own.to_dict().items() if value != shape.to_dict()[name]}
    assert changed == {"num_heads", "num_kv_heads", "intermediate_size"}


# ---- layers


def test_layers_may_have_different_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in DeepSeek's models, whose first layers have a wide MLP and no experts."""
    ort = pytest.importorskip("onnxruntime")
    narrow = 48

    def parts(spec: ModelSpec, layer: int) -> tuple[Part, ...]:
        attention, mlp = dense_layer(spec, layer)
        return (attention, mlp) if layer == 0 else (attention, DenseMlp(spec.hidden_size, narrow))

    plain = spec_of("llama")
    monkeypatch.setitem(ARCHITECTURES, "wide-first", Architecture(parts=parts))
    spec = replace(plain, architecture="wide-first")
    assert {spec.layer_shapes(layer)["mlp.up_proj.weight"][0] for layer in (1, 2)} == {narrow}
    assert spec.num_parameters() == plain.num_parameters() - 2 * 3 * (112 - narrow) * 64

    # The same numbers as a model of one width whose last channels are zero.
    weights = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in plain.tensor_shapes().items()}
    cut = {}
    for name, shape in spec.tensor_shapes().items():
        cut[name] = weights[name][tuple(slice(n) for n in shape)]
        padding = [(0, whole - part) for whole, part in zip(weights[name].shape, shape, strict=True)]
        weights[name] = np.pad(cut[name], padding)
    logits = []
    for folder, each, tensors in (("plain", plain, weights), ("own", spec, cut)):
        (tmp_path / folder).mkdir()
        graph = build_graph(each, tensors.__getitem__, tmp_path / folder, max_seq_len=8, opset=runnable_opset())
        session = ort.InferenceSession(str(graph))
        feeds = {"input_ids": np.array([[5, 17, 300]]), "start": np.zeros(1, np.int64), "num_tokens": np.array([3])}
        caches = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_")}
        feeds |= {name: np.zeros((1, *shape[1:]), np.float32) for name, shape in caches.items()}
        logits.append(session.run(["logits"], feeds)[0])
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_gguf_names_are_unique_within_a_layer() -> None:
    modules = [module for part in spec_of("qwen3").parts(0) for module in named(part)]
    assert len({module.gguf for module in modules}) == len({module.module for module in modules}) == len(modules)
