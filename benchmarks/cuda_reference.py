"""The reference for the cuda runner: a decoder in plain torch, in float64 by default."""

from __future__ import annotations

import torch

from deepseek_triton.ensemble.artefacts.cuda_layout import E4M3_MAX, MIN_TOKEN_SCALE, DecoderShape
from deepseek_triton.ensemble.decoder.mla import INNER_NORM_EPS
from deepseek_triton.ensemble.engine.runners.cuda.weights import WeightSource

CPU = torch.device("cpu")


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """Round each row [..., k] to E4M3 by its own scale."""
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=MIN_TOKEN_SCALE)
    codes = (x / scale).float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.to(x.dtype) * scale


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [n, heads, d], cos and sin [n, d / 2]."""
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


class Reference:
    """Computes one sequence at a time from its first token, without a cache.

    is_rounded: activations pass E4M3 where the weights are E4M3; without it only the weights are rounded.
    dtype: of everything that isn't E4M3. num_parts: that each product's sums are taken in.
    """

    def __init__(
        self,
        shape: DecoderShape,
        source: WeightSource,
        *,
        is_rounded: bool = True,
        dtype: torch.dtype = torch.float64,
        num_parts: int = 1,
    ) -> None:
        self.shape, self.source, self.is_rounded = shape, source, is_rounded
        self.dtype, self.num_parts = dtype, num_parts

    def logits(self, ids: list[int]) -> torch.Tensor:
        """[len(ids), vocab_size]."""
        shape = self.shape
        hidden = self._get("embedding")[torch.tensor(ids)]
        for layer in range(shape.num_layers):
            prefix = f"layers.{layer}."
            normed = rms_norm(hidden, self._get(prefix + "attention_norm"), shape.rms_norm_eps)
            attended = self._attended(normed, prefix) if shape.latent is None else self._latent(normed, prefix)
            hidden = hidden + self._linear(attended, prefix + "o")
            normed = rms_norm(hidden, self._get(prefix + "mlp_norm"), shape.rms_norm_eps)
            gate, up = self._linear(normed, prefix + "gate_up").chunk(2, dim=-1)
            hidden = hidden + self._linear(torch.nn.functional.silu(gate) * up, prefix + "down")
        head = self._get("embedding" if shape.tie_word_embeddings else "head")
        return rms_norm(hidden, self._get("norm"), shape.rms_norm_eps) @ head.T

    def _attended(self, normed: torch.Tensor, prefix: str) -> torch.Tensor:
        """Grouped-query attention's output [n, q_size], before o."""
        shape = self.shape
        n, d = len(normed), shape.head_dim
        cos, sin = self._get("rope.cos")[:n], self._get("rope.sin")[:n]
        qkv = self._linear(normed, prefix + "qkv")
        q, k, v = torch.split(qkv, [shape.q_size, shape.kv_size, shape.kv_size], dim=-1)
        q, k, v = (part.reshape(n, -1, d) for part in (q, k, v))
        if shape.qk_norm:
            q = rms_norm(q, self._get(prefix + "q_norm"), shape.rms_norm_eps)
            k = rms_norm(k, self._get(prefix + "k_norm"), shape.rms_norm_eps)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (part.repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=1) for part in (k, v))
        return self._attend(q, k, v, d**-0.5)

    def _latent(self, normed: torch.Tensor, prefix: str) -> torch.Tensor:
        """Latent attention's output [n, num_heads * v_head_dim], before o, by each head's own keys and values."""
        shape, options = self.shape, self.shape.latent
        assert options is not None
        n, heads, rank = len(normed), shape.num_heads, options.kv_lora_rank
        nope, rope, first = options.qk_nope_head_dim, options.qk_rope_head_dim, options.q_lora_rank
        cos, sin = self._get("rope.cos")[:n], self._get("rope.sin")[:n]
        width = heads * (nope + rope) if first is None else first
        q, latent, key = torch.split(self._linear(normed, prefix + "q_kv_a"), [width, rank, rope], dim=-1)
        if first is not None:
            q = self._linear(rms_norm(q, self._get(prefix + "q_a_norm"), INNER_NORM_EPS), prefix + "q_b")
        q_plain, q_rotary = torch.split(q.reshape(n, heads, -1), [nope, rope], dim=-1)
        latent = rms_norm(latent, self._get(prefix + "kv_a_norm"), INNER_NORM_EPS)
        made = (latent @ self._get(f"{prefix}kv_b.weight").T).reshape(n, heads, -1)
        k = torch.cat([made[:, :, :nope], rotate(key[:, None], cos, sin).expand(-1, heads, -1)], dim=-1)
        q = torch.cat([q_plain, rotate(q_rotary, cos, sin)], dim=-1)
        return self._attend(q, k, made[:, :, nope:], (nope + rope) ** -0.5 * options.softmax_factor)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Causal attention of q, k and v [n, heads, d]: [n, heads * d of v]."""
        n = len(q)
        mask = torch.full((n, n), float("-inf"), dtype=self.dtype).triu(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale + mask
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, -1)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._get(f"{name}.weight")
        if f"{name}.scale" in self.source.entries:
            weight = weight * self._get(f"{name}.scale")[:, None]
            x = round_rows(x) if self.is_rounded else x
        parts = zip(x.chunk(self.num_parts, dim=1), weight.chunk(self.num_parts, dim=1), strict=True)
        y = torch.stack([a @ b.T for a, b in parts]).sum(0)
        return y + self._get(f"{name}.bias") if f"{name}.bias" in self.source.entries else y

    def _get(self, name: str) -> torch.Tensor:
        return self.source.load(name, CPU).to(self.dtype)
