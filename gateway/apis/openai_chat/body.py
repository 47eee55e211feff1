"""The body of `/v1/chat/completions`. A field of OpenAI's API stands in `ChatBody`, as itself or in NOT_SUPPORTED."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deepseek_triton.gateway.apis.openai_chat.messages import ChatMessage
from deepseek_triton.gateway.apis.openai_chat.tools import Tool, ToolChoice
from deepseek_triton.gateway.apis.wire.sampling import SamplingBody
from deepseek_triton.gateway.apis.wire.validation import Body, field_error

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class JsonSchema(Body):
    """A schema for the answer."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(
        lambda value: (
            f"<{value.get('type')}>"
            if isinstance(value, dict) and value.get("type") in ("json_object", "json_schema")
            else "<text>"
        )
    ),
]


class ChatBody(SamplingBody):
    """A chat completion. store: whether its answer may be collected."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": (),
        "functions": ([],),
        "logit_bias": ({},),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "service_tier": ("auto", "default"),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    store: bool | None = None
    # Identifiers that choose nothing: prompts are found in the cache without a key.
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Not OpenAI's
    thinking_token_budget: int | None = Field(default=None, ge=0, lt=2**31)
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise field_error("top_logprobs", "top_logprobs must come with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise field_error("max_tokens", "max_tokens and max_completion_tokens must not differ; give one of them")
        if self.reasoning_effort is not None and self.thinking_token_budget is not None:
            raise field_error(
                "thinking_token_budget", "thinking_token_budget must not come with reasoning_effort; give one of them"
            )
        return self
