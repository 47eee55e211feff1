"""Answers → a `chat.completion`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from deepseek_triton.clients import Chunk, Generation
from deepseek_triton.gateway.apis.openai_chat.body import ChatBody
from deepseek_triton.gateway.apis.openai_chat.forced_call import ForcedCall
from deepseek_triton.gateway.apis.openai_chat.tools import Function
from deepseek_triton.gateway.apis.wire.openai_forms import finish_form, log_prob_rows, usage_form
from deepseek_triton.gateway.record import TokenUsage


def completion(
    body: ChatBody,
    request_id: str,
    generations: Sequence[Generation],
    usage: TokenUsage,
    forced: tuple[Function, ...] = (),
) -> dict[str, Any]:
    """The whole completion. forced: the functions of which each answer is a call."""
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": [_choice(body, generation, forced) for generation in generations],
        "usage": usage_form(usage),
        "system_fingerprint": None,
    }


def _choice(body: ChatBody, generation: Generation, forced: tuple[Function, ...]) -> dict[str, Any]:
    text, calls = generation.text, generation.tool_calls
    if forced:
        text, calls = "", ForcedCall(forced).push(generation.text, is_last=True)
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
    if generation.reasoning:
        message["reasoning_content"] = generation.reasoning
    if calls:
        message["tool_calls"] = [call.to_dict() for call in calls]
    return {
        "index": generation.sequence_index,
        "message": message,
        "logprobs": log_probs_form(generation) if body.logprobs else None,
        "finish_reason": finish_form(generation.finish_reason, has_calls=bool(calls)),
    }


def log_probs_form(answer: Chunk | Generation) -> dict[str, Any]:
    """`logprobs` of a choice: one row for each new token, of reasoning and calls too."""
    return {"content": log_prob_rows(answer), "refusal": None}
