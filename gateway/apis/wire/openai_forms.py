"""Parts that OpenAI's APIs have in common: token counts, log probabilities, finish reasons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from deepseek_triton.clients import Chunk, Generation, Token, TopLogProb
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.record import TokenUsage

OpenAiReason = Literal["stop", "length", "tool_calls"]


def usage_form(usage: TokenUsage) -> dict[str, Any]:
    """`usage` of a completion."""
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def finish_form(reason: str, *, has_calls: bool = False) -> OpenAiReason | None:
    """`finish_reason` of a choice; None while it runs. Raises `ApiError` for an answer that the server gave up."""
    if not reason:
        return None
    if reason == "length":
        return "length"
    if reason == "stop":
        return "tool_calls" if has_calls else "stop"
    raise ApiError(502, f"the model's server ended the answer: {reason}", code=f"answer_{reason}")


def log_prob_rows(answer: Chunk | Generation) -> list[dict[str, Any]]:
    """Each token's `logprob`, and the likeliest tokens of its place, as chats and responses have them."""
    return [
        {
            **_token_form(token),
            "logprob": log_prob,
            "top_logprobs": [{**_token_form(t), "logprob": t.log_prob} for t in top],
        }
        for token, log_prob, top in positions(answer)
    ]


def positions(answer: Chunk | Generation) -> Iterator[tuple[Token, float, tuple[TopLogProb, ...]]]:
    """Each new token, its log probability, and the likeliest tokens of its place. Raises `ApiError`."""
    if len(answer.tokens) != len(answer.log_probs):
        raise ApiError(502, "the model was built before servers told their tokens: build it again", code="no_tokens")
    tops = answer.top_log_probs or ((),) * len(answer.tokens)
    yield from zip(answer.tokens, answer.log_probs, tops, strict=True)


def _token_form(token: Token | TopLogProb) -> dict[str, Any]:
    raw = token.token.encode() if token.raw is None else token.raw
    return {"token": token.token, "bytes": list(raw)}
