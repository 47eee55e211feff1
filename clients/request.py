"""GenerateRequest: one prompt and how to continue it → the input tensors of `contract.GENERATE`.

Only what needs no model is checked: the ranges of options, and options that need each other. Whether a prompt fits the
context or a schema compiles is checked by the server. Tensors and ranges come from the table of request options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from deepseek_triton.clients.checks import check_flag, check_number, check_text, json_copy, json_text, text_tuple
from deepseek_triton.clients.messages import Turn, messages_json, read_messages
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec
from deepseek_triton.ensemble.protocol.request_options import (
    GUIDE_TYPES,
    REQUEST_OPTIONS,
    GuideType,
    RequestOption,
)

Scalar = bool | int | float | str
Value = Scalar | bytes | tuple[str, ...]  # of a tensor with the dims [1] or [-1]

# Read by the chat template, which a prompt doesn't go through.
CHAT_FIELDS = ("enable_thinking", "tools", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt, as it is or as a chat, and how to continue it.

    `prompt` goes to the model without a template; `messages` go through the model's chat template, with `tools` (in
    OpenAI's form) and `chat_template_kwargs` (the template's own variables). Exactly one of prompt and messages is
    given. An option that is None is not sent: the server's default holds. What each option means, its range and its
    default are in docs/requests.md.

    `guide` is a JSON schema, a regex, a grammar or a list of texts, as `guide_type` says. Schemas and lists may be
    given as Python objects or as JSON; "json" (any object) needs none.

    Raises `ValueError`, naming the field and its value, for anything out of range.
    """

    prompt: str | None = None
    messages: Sequence[Turn] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    # How the answer is made
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop_words: Sequence[str] | None = None
    bad_words: Sequence[str] | None = None
    end_id: int | None = None
    num_return_sequences: int | None = None
    guide_type: GuideType | None = None
    guide: str | Mapping[str, Any] | Sequence[str] | None = None
    # Reasoning
    enable_thinking: bool | None = None
    separate_reasoning: bool | None = None
    thinking_token_budget: int | None = None
    # What the answer holds
    exclude_input_in_output: bool | None = None
    return_log_probs: bool | None = None
    num_top_log_probs: int | None = None
    return_perf_metrics: bool | None = None
    # When it runs
    priority: int | None = None
    queue_timeout_ms: int | None = None
    timeout_ms: int | None = None

    def __post_init__(self) -> None:
        """Check every field; keep copies of those that could be changed afterwards."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(
                f"exactly one of prompt and messages must be given, "
                f"got prompt={self.prompt!r}, messages={self.messages!r}"
            )
        for option in _SENT_AS_IS:
            if (value := getattr(self, option.field)) is not None:
                object.__setattr__(self, option.field, _checked(option, value))
        if self.messages is not None:
            object.__setattr__(self, "messages", read_messages(self.messages))
        for field in ("tools", "chat_template_kwargs"):
            if (value := getattr(self, field)) is not None:
                object.__setattr__(self, field, json_copy(field, value))
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
        """The number of answers."""
        return self.num_return_sequences or 1

    def to_tensors(self, *, stream: bool) -> dict[TensorSpec, Value]:
        """Give the input tensors of `contract.GENERATE`, without those that are absent."""
        tensors: dict[TensorSpec, Value] = {contract.STREAM: stream}
        for option in _SENT_AS_IS:
            if (value := getattr(self, option.field)) is not None:
                tensors[option.tensor] = float(value) if option.dtype == "FP32" else value
        if self.messages is not None:
            tensors[contract.MESSAGES] = messages_json(
                self.messages, tools=self.tools, chat_template_kwargs=self.chat_template_kwargs
            )
        return tensors


_FIELDS = {field.name for field in fields(GenerateRequest)}
# The options whose field is what their tensor holds. Those without a field are the client's own to send.
_SENT_AS_IS = tuple(option for option in REQUEST_OPTIONS if option.field in _FIELDS - {"messages"})


def _checked(option: RequestOption, value: Any) -> Any:
    """The value of one option, or a copy of it that nobody can change afterwards."""
    if option.is_list:
        return text_tuple(option.field, value)
    if option.dtype == "BOOL":
        check_flag(option.field, value)
    elif option.range is not None:
        check_number(option.field, option.range, value)
    elif option.field not in ("guide_type", "guide"):  # these are checked together
        check_text(option.field, value)
    return value


def _guide_text(guide_type: Any, guide: Any) -> str | None:
    """The guide as text; both fields are checked."""
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
