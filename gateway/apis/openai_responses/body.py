"""The body of `/v1/responses`. A field of OpenAI's API stands in `ResponseBody`, as itself or in NOT_SUPPORTED."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deepseek_triton.gateway.apis.openai_chat.body import JsonObjectFormat, ReasoningEffort, TextFormat
from deepseek_triton.gateway.apis.openai_responses.items import InputItem
from deepseek_triton.gateway.apis.wire.sampling import Stop
from deepseek_triton.gateway.apis.wire.validation import Body, field_error

LOG_PROBS = "message.output_text.logprobs"


class ResponseTool(Body):
    """A function; no other kind of tool is supported."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenTool(Body):
    """A function by its name."""

    type: Literal["function"]
    name: str


class AllowedChoice(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenTool] = Field(min_length=1)


def _choice_tag(value: Any) -> str:
    if not isinstance(value, dict):
        return "<word>"
    return "<allowed>" if value.get("type") == "allowed_tools" else "<named>"


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[ChosenTool, Tag("<named>")]
    | Annotated[AllowedChoice, Tag("<allowed>")],
    Discriminator(_choice_tag),
]


class SchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


def _format_tag(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("json_object", "json_schema") else "<text>"


class TextConfig(Body):
    """The answer's form."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[SchemaFormat, Tag("<json_schema>")],
            Discriminator(_format_tag),
        ]
        | None
    ) = None


class ReasoningConfig(Body):
    """How much the model reasons; its reasoning comes as it is, never as a summary."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "context": ("auto",),
        "generate_summary": (),
        "mode": ("standard",),
        "summary": (),
    }

    effort: ReasoningEffort | None = None


class ResponseStreamOptions(Body):
    """What a stream holds beside the answer: its usage, whether it is asked for or not, and nothing more."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "include_obfuscation": (False,),
        "include_usage": (True, False),
    }


Metadata = dict[str, Annotated[str, Field(max_length=512)]]


class ResponseBody(Body):
    """A response. Fields after `user` are not OpenAI's, but vLLM's."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }

    model: str = Field(min_length=1)
    input: Annotated[
        Annotated[str, Field(min_length=1), Tag("<text>")]
        | Annotated[list[InputItem], Field(min_length=1), Tag("<items>")],
        Discriminator(lambda value: "<items>" if isinstance(value, list) else "<text>"),
    ]
    instructions: str | None = None
    background: bool | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: ReasoningConfig | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    text: TextConfig | None = None
    tool_choice: ResponseToolChoice | None = None
    tools: list[ResponseTool] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    top_p: float | None = Field(default=None, gt=0, le=1)
    # Identifiers that choose nothing: prompts are found in the cache without a key.
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: Stop | None = None
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    priority: int | None = Field(default=None, ge=0, lt=2**31)
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ResponseBody:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "stream_options must come with stream: true")
        if self.top_logprobs and not self.has_log_probs:
            raise field_error("top_logprobs", f"top_logprobs must come with include: [{LOG_PROBS!r}]")
        if self.background and self.stream:
            raise field_error("background", "background is not supported with stream: true")
        if self.background and self.store is False:
            raise field_error("store", "store must not be false with background: true")
        return self

    @property
    def has_log_probs(self) -> bool:
        """Whether the answer's log probabilities are asked for."""
        return LOG_PROBS in (self.include or ())
