"""The messages of a chat, in OpenAI's form → the messages that a model's chat template takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from deepseek_triton.gateway.apis.wire.validation import Body


class TextPart(Body):
    """A part of a message that is text; no other kind is supported."""

    type: Literal["text"]
    text: str


def _content_tag(value: Any) -> str:
    return "<parts>" if isinstance(value, list) else "<text>"


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<parts>")],
    Discriminator(_content_tag),
]


class SystemMessage(Body):
    """Instructions; a template knows them under one name."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None

    def to_turn(self) -> dict[str, Any]:
        """The template's message."""
        return _turn("system", self.content, name=self.name)


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None

    def to_turn(self) -> dict[str, Any]:
        """The template's message."""
        return _turn("user", self.content, name=self.name)


class CalledFunction(Body):
    """Which function was called; `parsed_arguments` is the OpenAI client's own copy of `arguments`."""

    name: str = Field(min_length=1)
    arguments: str
    parsed_arguments: Any = None


class MessageCall(Body):
    """A call that the model made earlier."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that join streamed deltas leave it in

    def to_turn(self) -> dict[str, Any]:
        """The template's call."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": "function", "function": function}


class AssistantMessage(Body):
    """What the model said earlier; `parsed` is the OpenAI client's own copy of `content`."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],), "audio": (), "function_call": ()}

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageCall] | None = None
    parsed: Any = None

    def to_turn(self) -> dict[str, Any]:
        """The template's message; a refusal is what the model said."""
        content = self.content if self.content is not None else self.refusal
        calls = [call.to_turn() for call in self.tool_calls or ()] or None
        if content is None and calls is None:
            content = ""
        return _turn("assistant", content, name=self.name, reasoning_content=self.reasoning_content, tool_calls=calls)


class ToolMessage(Body):
    """The result of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None

    def to_turn(self) -> dict[str, Any]:
        """The template's message."""
        return _turn("tool", self.content, name=self.name, tool_call_id=self.tool_call_id)


ROLES = ("system", "developer", "user", "assistant", "tool")


def _role_tag(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else None
    return f"<{'system' if role == 'developer' else role}>" if role in ROLES else "<user>"


ChatMessage = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(_role_tag),
]


def text_of(content: Any) -> str | None:
    """The text of a content; parts are joined by line ends, as the model's server joins them."""
    return "\n".join(part.text for part in content) if isinstance(content, list) else content


def _turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    given = {key: value for key, value in more.items() if value is not None}
    return {"role": role, "content": text_of(content), **given}
