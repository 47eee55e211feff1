"""Random decoders on the CPU and what they compute, in float32 and without any kernel: whole texts at once."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.decoder.mla import INNER_NORM_EPS, LatentAttention

Tensor = torch.Tensor
LARGEST_CODE = 448.0


def random_weights(shape: DecoderShape, *, is_fp8: bool, has_bias: bool = False, seed: int = 0) -> Any:
    """Weights with the attributes of `DecoderWeights`, in bfloat16 or E4M3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        drawn: Tensor = torch.randn(*size, generator=generator)
        return drawn / math.sqrt(size[-1])

    def matrix(*size: int, bias: bool = False) -> Any:
        weight = normal(*size)
        given = normal(size[-2]) if bias else None
        if not is_fp8:
            return SimpleNamespace(weight=weight.bfloat16(), scale=None, bias=given)
        scale = weight.abs().amax(-1) / LARGEST_CODE
        return SimpleNamespace(weight=(weight / scale[..., None]).to(torch.float8_e4m3fn), scale=scale, bias=given)

    def norm(size: int) -> Tensor:
        return (1 + torch.rand(size, generator=generator) / 2).bfloat16()

    def layer(index: int) -> Any:
        hidden, latent, experts = shape.hidden_size, shape.latent, shape.experts
        if latent is None:
            width = shape.q_size + 2 * shape.kv_size
            attention = SimpleNamespace(
                norm=norm(hidden), qk_norms=torch.stack([norm(shape.head_dim), norm(shape.head_dim)]),
                qkv=matrix(width, hidden, bias=has_bias), o=matrix(hidden, shape.q_size),
            )  # fmt: skip
            attention.matrices = attention.qkv, attention.o
        else:
            entry, heads = latent.kv_lora_rank + latent.qk_rope_head_dim, shape.num_heads
            attention = SimpleNamespace(
                norm=norm(hidden), q_kv_a=matrix(heads * latent.qk_head_dim + entry, hidden, bias=has_bias),
                kv_norm=norm(latent.kv_lora_rank),
                kv_b=normal(heads, latent.qk_nope_head_dim + latent.v_head_dim, latent.kv_lora_rank).bfloat16(),
                o=matrix(hidden, heads * latent.v_head_dim, bias=has_bias),
            )  # fmt: skip
            attention.matrices = attention.q_kv_a, attention.o
        if experts is None or index < experts.first_dense_layers:
            inner = shape.intermediate_size
            mlp = SimpleNamespace(norm=norm(hidden), gate_up=matrix(2 * inner, hidden), down=matrix(hidden, inner))
        else:
            count, inner = experts.num_experts + experts.num_shared_experts, experts.intermediate_size
            bias = torch.rand(experts.num_experts, generator=generator) if experts.choice == "group_top2" else None
            mlp = SimpleNamespace(
                norm=norm(hidden), gate_up=matrix(count, 2 * inner, hidden), down=matrix(count, hidden, inner),
                router=SimpleNamespace(weight=4 * normal(experts.num_experts, hidden), bias=bias),
            )  # fmt: skip
        mlp.matrices = mlp.gate_up, mlp.down
        return SimpleNamespace(attention=attention, mlp=mlp, matrices=(*attention.matrices, *mlp.matrices))

    half = shape.rotary_dim // 2
    angles = torch.arange(shape.max_seq_len)[:, None] * 1000.0 ** -(torch.arange(half) / half)
    return SimpleNamespace(
        embedding=torch.randn(shape.vocab_size, shape.hidden_size, generator=generator).bfloat16(),
        layers=[layer(index) for index in range(shape.num_layers)], norm=norm(shape.hidden_size),
        head=SimpleNamespace(weight=normal(shape.vocab_size, shape.hidden_size).bfloat16()),
        cos=angles.cos(), sin=angles.sin(),
    )  # fmt: skip


def logits(shape: DecoderShape, weights: Any, ids: Tensor) -> Tensor:
    """[tokens, vocab_size] of one text."""
    x = weights.embedding[ids].float()
    attend = _attend if shape.latent is None else _attend_latent
    for layer in weights.layers:
        x = x + attend(shape, weights, layer.attention, x)
        normed = _norm(x, layer.mlp.norm, shape.rms_norm_eps)
        x = x + (_experts(shape, layer.mlp, normed) if hasattr(layer.mlp, "router") else _gated(layer.mlp, normed))
    head: Tensor = weights.head.weight.float()
    return _norm(x, weights.norm, shape.rms_norm_eps) @ head.t()


def _plain(linear: Any) -> Tensor:
    weight: Tensor = linear.weight.float()
    return weight if linear.scale is None else weight * linear.scale[..., None]


def _times(linear: Any, x: Tensor) -> Tensor:
    product = x @ _plain(linear).t()
    return product if linear.bias is None else product + linear.bias


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def _rotated(weights: Any, x: Tensor) -> Tensor:
    """x: [tokens, ..., rotary_dim], its halves rotated by the tokens' positions."""
    low, high = x.chunk(2, -1)
    size = (len(x), *(1 for _ in x.shape[1:-1]), low.shape[-1])
    cos, sin = (table[: len(x)].view(size) for table in (weights.cos, weights.sin))
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def _softmax(scores: Tensor) -> Tensor:
    """Of scores [heads, tokens, tokens], each token's up to itself."""
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, -torch.inf).softmax(-1)


def _attend(shape: DecoderShape, weights: Any, own: Any, x: Tensor) -> Tensor:
    both = _times(own.qkv, _norm(x, own.norm, shape.rms_norm_eps)).view(len(x), -1, shape.head_dim)
    q, k, v = both.split_with_sizes([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
    if shape.qk_norm:
        q, k = (_norm(part, norm, shape.rms_norm_eps) for part, norm in zip((q, k), own.qk_norms, strict=True))
    q, k = _rotated(weights, q), _rotated(weights, k)
    k, v = (part.repeat_interleave(shape.num_heads // shape.num_kv_heads, 1) for part in (k, v))
    shares = _softmax(torch.einsum("thd,shd->hts", q, k) * shape.head_dim**-0.5)
    return _times(own.o, torch.einsum("hts,shd->thd", shares, v).flatten(1))


def _attend_latent(shape: DecoderShape, weights: Any, own: Any, x: Tensor) -> Tensor:
    assert shape.latent is not None
    latent, heads = shape.latent, shape.num_heads
    both = _times(own.q_kv_a, _norm(x, own.norm, shape.rms_norm_eps))
    nope, rope, rank = latent.qk_nope_head_dim, latent.qk_rope_head_dim, latent.kv_lora_rank
    query, compressed, key = both.split_with_sizes([heads * (nope + rope), rank, rope], -1)
    query, rotary = query.view(len(x), heads, -1).split_with_sizes([nope, rope], -1)
    compressed, key = _norm(compressed, own.kv_norm, INNER_NORM_EPS), _rotated(weights, key)
    to_keys, to_values = own.kv_b.float().split_with_sizes([nope, latent.v_head_dim], 1)
    keys, values = (torch.einsum("sc,hnc->shn", compressed, part) for part in (to_keys, to_values))
    scores = torch.einsum("thn,shn->hts", query, keys) + torch.einsum("thr,sr->hts", _rotated(weights, rotary), key)
    shares = _softmax(scores * LatentAttention(shape.hidden_size, heads, latent).softmax_scale)
    return _times(own.o, torch.einsum("hts,shv->thv", shares, values).flatten(1))


def _gated(own: Any, x: Tensor) -> Tensor:
    gate, up = _times(own.gate_up, x).chunk(2, -1)
    return _times(own.down, torch.nn.functional.silu(gate) * up)


def _experts(shape: DecoderShape, own: Any, x: Tensor) -> Tensor:
    assert shape.experts is not None
    experts = shape.experts
    scores = x.bfloat16().float() @ own.router.weight.t()
    scores = scores.softmax(-1) if experts.scores == "softmax" else scores.sigmoid()
    chosen = (scores if own.router.bias is None else scores + own.router.bias).topk(experts.num_experts_per_tok).indices
    factors = scores.gather(1, chosen)
    if experts.is_normalised:
        factors = factors / factors.sum(-1, keepdim=True)
    factors = factors * experts.scale
    out = torch.zeros_like(x)
    for token in range(len(x)):
        pairs = [*zip(chosen[token].tolist(), factors[token].tolist(), strict=True)]
        pairs += [(experts.num_experts + shared, 1.0) for shared in range(experts.num_shared_experts)]
        for expert, factor in pairs:
            gate_up, down = (
                SimpleNamespace(
                    weight=part.weight[expert], scale=None if part.scale is None else part.scale[expert], bias=None
                )
                for part in (own.gate_up, own.down)
            )
            out[token] += factor * _gated(SimpleNamespace(gate_up=gate_up, down=down), x[token : token + 1])[0]
    return out
