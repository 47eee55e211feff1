"""Multi-head latent attention: keys and values of all heads are made from one short vector a token, the latent.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1. The indexer, which chooses the tokens that are attended to:
DeepSeek-V3.2, arXiv 2512.02556, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from deepseek_triton.ensemble.decoder.options import LatentOptions
from deepseek_triton.ensemble.decoder.part import (
    WHOLE,
    CacheTensor,
    Linear,
    Norm,
    Plain,
    Rotary,
    Shard,
    SharedChannels,
    Split,
    Tap,
    part_of,
)

NORM = "input_layernorm"
Q, Q_A, Q_B, KV_A, KV_B, OUT = (
    f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
)
Q_NORM, KV_NORM = "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"
ATTENDED = "self_attn.attention_flat"  # what attention gives, heads side by side
INNER_NORM_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps is
INDEX_NORM_EPS = 1e-6  # of the indexer's layer norm
INDEX_Q, INDEX_K, INDEX_NORM, INDEX_BIAS, INDEX_WEIGHTS = (
    f"self_attn.indexer.{name}"
    for name in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
)


@dataclass(frozen=True)
class LatentAttention:
    """Query heads read the latent and one rotary key that all heads share."""

    hidden_size: int
    num_heads: int
    options: LatentOptions

    NOUN: ClassVar[str] = "latent attention"
    # kv_b_proj isn't among them: decoding multiplies queries and outputs with its halves, and not the latent.
    LINEARS: ClassVar[tuple[str, ...]] = (Q, Q_A, Q_B, KV_A, OUT)

    @property
    def qk_head_dim(self) -> int:
        """See `LatentOptions`."""
        return self.options.qk_head_dim

    @property
    def entry_size(self) -> int:
        """Elements that a token has in the cache: the normalised latent, then the rotated key."""
        return self.options.kv_lora_rank + self.options.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.qk_head_dim**-0.5 * self.options.softmax_factor)

    @property
    def query(self) -> Linear:
        """The matrix that gives the query heads."""
        options, heads = self.options, self.num_heads
        rotary = Rotary(heads, self.qk_head_dim, options.qk_nope_head_dim, options.qk_rope_head_dim)
        if options.q_lora_rank is None:
            return Linear(Q, "attn_q", heads * self.qk_head_dim, self.hidden_size, rotary=rotary)
        return Linear(Q_B, "attn_q_b", heads * self.qk_head_dim, options.q_lora_rank, rotary=rotary)

    @property
    def modules(self) -> tuple[Norm | Linear | Plain, ...]:
        """See `Part`."""
        options, hidden, rank = self.options, self.hidden_size, self.options.q_lora_rank
        compressed: tuple[Norm | Linear, ...] = ()
        if rank is not None:
            compressed = (
                Linear(Q_A, "attn_q_a", rank, hidden, options.has_bias),
                Norm(Q_NORM, "attn_q_a_norm", "q_a_norm", rank),
            )
        key = Rotary(1, self.entry_size, options.kv_lora_rank, options.qk_rope_head_dim)
        values = self.num_heads * options.v_head_dim
        return (
            Norm(NORM, "attn_norm", "attention_norm", hidden),
            *compressed,
            self.query,
            Linear(KV_A, "attn_kv_a_mqa", self.entry_size, hidden, options.has_bias, key),
            Norm(KV_NORM, "attn_kv_a_norm", "kv_a_norm", options.kv_lora_rank),
            Linear(KV_B, "attn_kv_b", self.num_heads * options.qk_nope_head_dim + values, options.kv_lora_rank),
            *self._indexer,
            Linear(OUT, "attn_output", hidden, values, options.has_bias),
        )

    @property
    def _indexer(self) -> tuple[Plain, ...]:
        """What an indexer is made of; its rotary channels are the first of a head, halves in every checkpoint."""
        indexer, rank = self.options.indexer, self.options.q_lora_rank
        if indexer is None or rank is None:
            return ()
        return (
            Plain(INDEX_Q, "indexer.attn_q_b.weight", "indexer.q", (indexer.num_heads * indexer.head_dim, rank)),
            Plain(INDEX_K, "indexer.attn_k.weight", "indexer.k", (indexer.head_dim, self.hidden_size)),
            Plain(INDEX_NORM, "indexer.k_norm.weight", "indexer.k_norm", (indexer.head_dim,)),
            Plain(INDEX_BIAS, "indexer.k_norm.bias", "indexer.k_norm_bias", (indexer.head_dim,)),
            Plain(INDEX_WEIGHTS, "indexer.proj.weight", "indexer.weights", (indexer.num_heads, self.hidden_size)),
        )

    @property
    def taps(self) -> tuple[Tap, ...]:
        """See `Part`. The output's channels are sums over the latent: no module's channels can be divided for them.

        An indexer reads the norms' outputs too, and its matrices stay as they are: then those can't be divided either.
        """
        if self.options.q_lora_rank is None:
            return Tap(NORM, (Q, KV_A), producer=NORM), Tap(ATTENDED, (OUT,))
        norm, q_norm = (NORM, Q_NORM) if self.options.indexer is None else (None, None)
        return Tap(NORM, (Q_A, KV_A), producer=norm), Tap(Q_NORM, (Q_B,), producer=q_norm), Tap(ATTENDED, (OUT,))

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """What reads hidden states; the query's second matrix, where it has one; kv_b; and o."""
        if self.options.q_lora_rank is None:
            return {"q_kv_a": (Q, KV_A), "kv_b": (KV_B,), "o": (OUT,)}
        return {"q_kv_a": (Q_A, KV_A), "q_b": (Q_B,), "kv_b": (KV_B,), "o": (OUT,)}

    @property
    def stacked(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Nothing."""
        return {}

    @property
    def cache(self) -> tuple[CacheTensor, ...]:
        """One entry for all heads, and one for an indexer."""
        latent = CacheTensor("latent", 1, self.entry_size)
        if self.options.indexer is None:
            return (latent,)
        return latent, CacheTensor("index", 1, self.options.indexer.head_dim)

    def shared_channels(self, tap: str) -> SharedChannels | None:
        """None: see `taps`."""
        return None

    def reason_against(self, split: Split) -> str | None:
        """See `Part`."""
        if self.num_heads % split.tensor_size:
            return f"{self.num_heads} heads can't be shared out evenly"
        return None

    def sharded(self, split: Split, rank: int) -> LatentAttention:
        """Whole heads; every rank computes and keeps the latent of all."""
        return replace(self, num_heads=self.num_heads // split.tensor_size)

    def shard(self, matrix: str, kind: str, rank: int, split: Split) -> Shard:
        """Rows of what makes heads, all of what makes latents; columns of o: each rank has a part of every sum."""
        own = self.sharded(split, rank)
        rank %= split.tensor_size
        values = own.num_heads * self.options.v_head_dim
        if matrix == "o":
            return Shard(columns=part_of(0, rank, values)) if kind == "weight" else WHOLE
        if matrix == "kv_b":
            return Shard((part_of(0, rank, own.num_heads * self.options.qk_nope_head_dim + values),))
        if matrix == "q_b":
            return Shard((part_of(0, rank, own.query.out_features),))
        if self.options.q_lora_rank is not None:
            return WHOLE
        queries = self.query.out_features
        return Shard((part_of(0, rank, own.query.out_features), slice(queries, queries + self.entry_size)))
