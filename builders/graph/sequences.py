"""How sequences lie in a graph's tensors: all in which a graph with a cache and a scoring graph differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from deepseek_triton.builders.graph.node_list import Body
from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention
from deepseek_triton.ensemble.decoder.part import CacheTensor


@dataclass(frozen=True)
class Heads:
    """How many heads attention gives, and how wide each is."""

    num_heads: int
    head_dim: int


class Sequences(Protocol):
    """Positions, attention, and what enters and leaves. Every method adds nodes and gives the name of a value."""

    fuses_attention: bool  # whether `grouped_query` stands for `rotated`, `remembered` and `attention`

    def begin(self) -> str:
        """Declare the inputs; positions and masks; the token ids to embed [batch, seq_len]."""

    def rows(self, heads: str) -> str:
        """heads [batch, heads, seq_len, head_dim] as attention takes them."""

    def rotated(self, heads: str, name: str) -> str:
        """`rows`, with rotary embedding."""

    def remembered(self, layer: int, tensor: CacheTensor, rows: str) -> str:
        """What stands in a cache, `rows` among it: [batch, num_heads, kv_len, head_dim]."""

    def attention(
        self, heads: Heads, qkv: tuple[str, str, str], name: str, scale: float | None = None, mask: str | None = None
    ) -> str:
        """Attention of `rows` to what is remembered: [batch, num_heads, seq_len, head_dim].

        scale: None: its usual one. mask: BOOL [batch, 1, seq_len, kv_len], of `chosen`; None: of all earlier positions.
        """

    def chosen(self, scores: Body, topk: int, name: str) -> str:
        """The mask `name` of the `topk` earlier positions with the highest scores: BOOL [batch, 1, seq_len, kv_len].

        scores: adds the nodes that give them, float32 [batch, seq_len, kv_len].
        """

    def grouped_query(self, layer: int, part: GroupedQueryAttention, qkv: tuple[str, ...], name: str) -> str:
        """All of grouped-query attention, cache and rotation included, in one node called `name`.

        qkv: one value [batch, seq_len, width] for each, or one with all three, before rotation; the output has the
        query's shape.
        """

    def by_length(self, most: int, few: Body, many: Body, name: str) -> str:
        """The value of `few` where at most so many positions are computed at once, of `many` where they are more."""

    def needed(self, layer: int, value: str) -> str:
        """Of value [batch, seq_len, width], behind a layer's attention, the positions that anything follows from."""

    def predicting(self, hidden: str) -> str:
        """The last layer's output where a next token is predicted."""

    def with_logits(self, hidden: str) -> str:
        """Of `predicting`, behind the last norm: what the head multiplies."""

    def finish(self, logits: str) -> None:
        """Declare the outputs, from the head's product in the graph's dtype."""
