"""How sequences lie in a graph's tensors: all in which a graph with a cache and a scoring graph differ."""

from __future__ import annotations

from typing import Protocol

from deepseek_triton.ensemble.decoder.gqa import GroupedQueryAttention


class Sequences(Protocol):
    """Positions, attention, and what enters and leaves. Every method adds nodes and gives the name of a value."""

    def begin(self) -> str:
        """Declare the inputs; positions and masks; the token ids to embed [batch, seq_len]."""

    def rotated(self, heads: str, name: str) -> str:
        """heads [batch, heads, seq_len, head_dim] with rotary embedding."""

    def attended(self, part: GroupedQueryAttention, layer: int, qkv: tuple[str, str, str], name: str) -> str:
        """Attention of rotated queries and keys, and values: [batch, num_heads, seq_len, head_dim]."""

    def predicting(self, hidden: str) -> str:
        """The last layer's output where a next token is predicted."""

    def finish(self, logits: str) -> None:
        """Declare the outputs, from the head's product in the graph's dtype."""
