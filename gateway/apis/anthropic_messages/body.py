"""The bodies of `/v1/messages`. A field of Anthropic's API stands in them, as itself or in NOT_SUPPORTED."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deepseek_triton.gateway.apis.anthropic_messages.blocks import AssistantTurn, CacheControl, Text, Turn
from deepseek_triton.gateway.apis.wire.validation import Body, field_error


class MessageTool(Body):
    """A tool that the client runs; Anthropic's own tools are refused by their type."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "eager_input_streaming": (False, True),  # inputs are streamed as they come
        "input_examples": ([],),
    }

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_-]+$")
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Body):
    """Whether the model must call a tool; `name` belongs to the type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise field_error("name", 'name must come with type "tool", and with no other')
        return self


class ThinkingOn(Body):
    """A bound for the reasoning."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"display": ("summarized",)}

    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1, lt=2**31)


class ThinkingFree(Body):
    """No reasoning, or as much as the model likes."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"display": ("summarized",)}

    type: Literal["disabled", "adaptive"]


Thinking = Annotated[
    Annotated[ThinkingOn, Tag("<on>")] | Annotated[ThinkingFree, Tag("<free>")],
    Discriminator(lambda value: "<on>" if isinstance(value, dict) and value.get("type") == "enabled" else "<free>"),
]


class JsonFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the answer is formed."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class Metadata(Body):
    """Who asks; it chooses nothing."""

    user_id: str | None = None


class CountBody(Body):
    """What a prompt is made of."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "container": (),
        "context_management": (),
        "diagnostics": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "user_profile_id": (),
        "workspace_id": (),
    }

    model: str = Field(min_length=1)
    messages: list[Turn] = Field(min_length=1)
    system: Text | None = None
    tools: list[MessageTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    @model_validator(mode="after")
    def _check_together(self) -> CountBody:
        if isinstance(self.messages[-1], AssistantTurn):
            raise field_error("messages", "messages must not end with the assistant: an answer's beginning isn't taken")
        if isinstance(self.thinking, ThinkingOn) and self.output_config and self.output_config.effort:
            raise field_error("thinking", "thinking.budget_tokens must not come with output_config.effort; give one")
        return self


class MessagesBody(CountBody):
    """A message to be made."""

    max_tokens: int = Field(ge=1, lt=2**31)
    stream: bool | None = None
    stop_sequences: list[str] | None = Field(default=None, max_length=64)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    metadata: Metadata | None = None
