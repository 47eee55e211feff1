"""One prompt and how to continue it → the input tensors of `contract.GENERATE`.

Only what needs no model is checked: the ranges of options and what they need of each other, not whether a prompt fits
the context or a schema compiles. A field and its tensor stand side by side in `FIELD_TENSORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from deepseek_triton.clients.checks import (
    MAX_FLOAT32,
    MAX_INT32,
    MAX_UINT64,
    Range,
    check_flag,
    check_text,
    json_copy,
    json_text,
    text_tuple,
)
from deepseek_triton.clients.messages import Turn, messages_json, read_messages
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec

Scalar = bool | int | float | str
GuideType = Literal["json", "json_schema", "regex", "grammar", "ebnf_grammar", "choice"]
GUIDE_TYPES: tuple[GuideType, ...] = get_args(GuideType)

RANGES = {
    "max_tokens": Range(1, MAX_INT32),
    "min_tokens": Range(0, MAX_INT32),
    "temperature": Range(0.0, MAX_FLOAT32),
    "top_k": Range(0, MAX_INT32),
    "top_p": Range(0.0, 1.0, excludes_low=True),
    "min_p": Range(0.0, 1.0),
    "seed": Range(0, MAX_UINT64),
    "repetition_penalty": Range(0.0, MAX_FLOAT32, excludes_low=True),
    "presence_penalty": Range(-MAX_FLOAT32, MAX_FLOAT32),
    "frequency_penalty": Range(-MAX_FLOAT32, MAX_FLOAT32),
    "end_id": Range(-1, MAX_INT32),
    "num_return_sequences": Range(1, MAX_INT32),
    "thinking_token_budget": Range(0, MAX_INT32),
    "num_top_log_probs": Range(0, MAX_INT32),
    "priority": Range(0, MAX_INT32),
    "queue_timeout_ms": Range(0, MAX_INT32),
    "timeout_ms": Range(0, MAX_INT32),
}
CHECKS: dict[str, Callable[[str, Any], None]] = {
    "prompt": check_text,
    **{name: allowed.check for name, allowed in RANGES.items()},
    **dict.fromkeys(
        ("enable_thinking", "separate_reasoning", "echo", "return_log_probs", "return_perf_metrics"), check_flag
    ),
}
# How a field is kept: checked, and out of reach of those who hold what was given.
COPIES: dict[str, Callable[[str, Any], Any]] = {
    "messages": lambda _, messages: read_messages(messages),
    "tools": json_copy,
    "chat_template_kwargs": json_copy,
    "stop_words": text_tuple,
    "bad_words": text_tuple,
}
# What the chat template reads: a prompt has none.
CHAT_FIELDS = ("enable_thinking", "tools", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt, as it is or as a chat, and how to continue it.

    `prompt` goes to the model without a template; `messages` go through the model's chat template, with `tools` (in
    OpenAI's form) and `chat_template_kwargs` (the template's own variables). Exactly one of prompt and messages is
    given. An option that is None is not sent: the server's default holds.

    `guide` says what the text may be: a JSON schema, a regex, a grammar or a list of texts, by `guide_type`. Schemas
    and lists may be given as such or as JSON; "json" (any object) needs none.

    Raises `ValueError`, naming the field and its value, for anything out of range.
    """

    prompt: str | None = None
    messages: Sequence[Turn] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    # Sampling
    max_tokens: int | None = None  # tokens, 1 …
    min_tokens: int | None = None  # tokens, 0 … max_tokens
    temperature: float | None = None  # 0 (greedy) …; finite
    top_k: int | None = None  # tokens, 0 (all) …
    top_p: float | None = None  # probability, 0 < top_p <= 1
    min_p: float | None = None  # of the likeliest token's probability, 0 … 1
    seed: int | None = None  # 0 … 2^64-1
    repetition_penalty: float | None = None  # above 0; 1: none
    presence_penalty: float | None = None  # finite; 0: none
    frequency_penalty: float | None = None  # finite; 0: none
    stop_words: Sequence[str] | None = None  # end the text, and are no part of it
    bad_words: Sequence[str] | None = None  # never come in the text
    end_id: int | None = None  # token; -1: none ends the text
    num_return_sequences: int | None = None  # answers to the one prompt, 1 …
    guide_type: GuideType | None = None
    guide: str | Mapping[str, Any] | Sequence[str] | None = None
    # Reasoning
    enable_thinking: bool | None = None
    separate_reasoning: bool | None = None  # apart from the text
    thinking_token_budget: int | None = None  # tokens, 0 …
    # What the answer holds
    echo: bool | None = None  # the text begins with the prompt
    return_log_probs: bool | None = None
    num_top_log_probs: int | None = None  # likeliest tokens beside each, 0 …; asks for log probs too
    return_perf_metrics: bool | None = None  # times
    # When it runs
    priority: int | None = None  # 1 (most urgent) …; 0: the server's default
    queue_timeout_ms: int | None = None  # ms until the answer must have begun; 0: never
    timeout_ms: int | None = None  # ms until it must be complete; 0: never

    def __post_init__(self) -> None:
        """Check every field; keep copies of those that could be changed afterwards."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(
                f"exactly one of prompt and messages must be given, "
                f"got prompt={self.prompt!r}, messages={self.messages!r}"
            )
        for field, check in CHECKS.items():
            if (value := getattr(self, field)) is not None:
                check(field, value)
        for field, copy in COPIES.items():
            if (value := getattr(self, field)) is not None:
                object.__setattr__(self, field, copy(field, value))
        for field in CHAT_FIELDS:
            if (value := getattr(self, field)) is not None and self.messages is None:
                raise ValueError(f"{field} must come with messages, for prompt has no chat template, got {value!r}")
        if not isinstance(self.tools, list | None):
            raise ValueError(f"tools must be a list, got {self.tools!r}")
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(f"chat_template_kwargs must be a mapping, got {self.chat_template_kwargs!r}")
        if self.max_tokens is not None and self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens, {self.max_tokens}, got {self.min_tokens}")
        object.__setattr__(self, "guide", _guide_text(self.guide_type, self.guide))

    @property
    def num_sequences(self) -> int:
        """How many answers the server gives."""
        return self.num_return_sequences or 1

    def to_tensors(self, *, stream: bool) -> dict[TensorSpec, Scalar | tuple[str, ...]]:
        """Give the input tensors of `contract.GENERATE`: one element, or a tuple for the dims [-1]; no absent ones."""
        tensors: dict[TensorSpec, Scalar | tuple[str, ...]] = {contract.STREAM: stream}
        for field, spec in FIELD_TENSORS.items():
            value = getattr(self, field)
            if value is not None:
                tensors[spec] = float(value) if spec.dtype == "FP32" else value
        if self.messages is not None:
            tensors[contract.MESSAGES] = messages_json(
                self.messages, tools=self.tools, chat_template_kwargs=self.chat_template_kwargs
            )
        if self.echo is not None:
            tensors[contract.EXCLUDE_INPUT_IN_OUTPUT] = not self.echo
        return tensors


# The fields that travel as they are.
FIELD_TENSORS: dict[str, TensorSpec] = {
    "prompt": contract.TEXT_INPUT,
    "max_tokens": contract.MAX_TOKENS,
    "min_tokens": contract.MIN_TOKENS,
    "temperature": contract.TEMPERATURE,
    "top_k": contract.TOP_K,
    "top_p": contract.TOP_P,
    "min_p": contract.MIN_P,
    "seed": contract.SEED,
    "repetition_penalty": contract.REPETITION_PENALTY,
    "presence_penalty": contract.PRESENCE_PENALTY,
    "frequency_penalty": contract.FREQUENCY_PENALTY,
    "stop_words": contract.STOP_WORDS,
    "bad_words": contract.BAD_WORDS,
    "end_id": contract.END_ID,
    "num_return_sequences": contract.NUM_RETURN_SEQUENCES,
    "guide_type": contract.GUIDE_TYPE,
    "guide": contract.GUIDE,
    "enable_thinking": contract.ENABLE_THINKING,
    "separate_reasoning": contract.SEPARATE_REASONING,
    "thinking_token_budget": contract.THINKING_TOKEN_BUDGET,
    "return_log_probs": contract.RETURN_LOG_PROBS,
    "num_top_log_probs": contract.NUM_TOP_LOG_PROBS,
    "return_perf_metrics": contract.RETURN_PERF_METRICS,
    "priority": contract.PRIORITY,
    "queue_timeout_ms": contract.QUEUE_TIMEOUT_MS,
    "timeout_ms": contract.TIMEOUT_MS,
}


def _guide_text(guide_type: Any, guide: Any) -> str | None:
    """The guide as it travels."""
    if guide_type is None and guide is None:
        return None
    if guide_type not in GUIDE_TYPES:
        raise ValueError(f"guide_type must be one of {', '.join(GUIDE_TYPES)}, got {guide_type!r}")
    if guide is None and guide_type != "json":
        raise ValueError(f"guide must be given with guide_type {guide_type!r}, got {guide!r}")
    if guide_type == "json_schema" and isinstance(guide, Mapping):
        return json_text("guide", dict(guide))
    if guide_type == "choice" and isinstance(guide, list | tuple):
        return json_text("guide", guide)
    if guide is not None:
        check_text("guide", guide)
    return guide  # type: ignore[no-any-return]
