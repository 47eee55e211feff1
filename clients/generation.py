"""Generation: a whole answer, joined from its chunks. It knows nothing of requests or servers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from deepseek_triton.clients.response import Chunk, Times, Token, ToolCall, TopLogProb
from deepseek_triton.ensemble.protocol.contract import FinishReason


@dataclass(frozen=True)
class Generation:
    """A whole answer of one sequence. Its fields are those of `Chunk`, joined."""

    text: str
    finish_reason: FinishReason
    num_input_tokens: int
    num_output_tokens: int
    sequence_index: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    log_probs: tuple[float, ...] = ()
    top_log_probs: tuple[tuple[TopLogProb, ...], ...] = ()
    cum_log_prob: float | None = None
    times: Times | None = None
    tokens: tuple[Token, ...] = ()
    num_cached_tokens: int | None = None
    num_reasoning_tokens: int | None = None

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk]) -> Generation:
        """Join all chunks of one sequence; `ValueError` if the last one is missing."""
        last = chunks[-1] if chunks else None
        if last is None or last.finish_reason == "":
            raise ValueError(f"chunks must end with one that has a finish_reason, got {last!r}")
        return cls(
            text="".join(chunk.text for chunk in chunks),
            finish_reason=last.finish_reason,
            num_input_tokens=last.num_input_tokens,
            num_output_tokens=last.num_output_tokens,
            sequence_index=last.sequence_index,
            reasoning="".join(chunk.reasoning for chunk in chunks),
            tool_calls=_join_calls(call for chunk in chunks for call in chunk.tool_calls),
            log_probs=tuple(value for chunk in chunks for value in chunk.log_probs),
            top_log_probs=tuple(row for chunk in chunks for row in chunk.top_log_probs),
            cum_log_prob=last.cum_log_prob,
            times=last.times,
            tokens=tuple(token for chunk in chunks for token in chunk.tokens),
            num_cached_tokens=last.num_cached_tokens,
            num_reasoning_tokens=last.num_reasoning_tokens,
        )

    @classmethod
    def all_from_chunks(cls, chunks: Iterable[Chunk]) -> tuple[Generation, ...]:
        """Join the chunks of a request's sequences, in any order; the answers are in the order of their index."""
        sequences: dict[int, list[Chunk]] = {}
        for chunk in chunks:
            sequences.setdefault(chunk.sequence_index, []).append(chunk)
        return tuple(cls.from_chunks(sequences[index]) for index in sorted(sequences))


def _join_calls(deltas: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """The calls that the deltas make, each with its arguments joined."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        call = calls.get(delta.index)
        calls[delta.index] = delta if call is None else replace(call, arguments=call.arguments + delta.arguments)
    return tuple(calls[index] for index in sorted(calls))
