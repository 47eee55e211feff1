"""Messages and their blocks, in Anthropic's form → the messages that a model's chat template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from deepseek_triton.gateway.apis.wire.validation import Body


class CacheControl(Body):
    """A wish to keep a prompt. It chooses nothing: every prompt is kept as long as there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Body):
    """What all blocks share."""

    cache_control: CacheControl | None = None


class TextBlock(Block):
    """Text."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"citations": ([],)}

    type: Literal["text"]
    text: str


class ThinkingBlock(Block):
    """What the model thought earlier; nothing checks the signature."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Block):
    """A call that the model made earlier."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"caller": ({"type": "direct"},), "toolset_name": ()}

    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: dict[str, Any]

    def to_call(self) -> dict[str, Any]:
        """The template's call."""
        function = {"name": self.name, "arguments": json.dumps(self.input, ensure_ascii=False)}
        return {"id": self.id, "type": "function", "function": function}


def _content_tag(value: Any) -> str:
    return "<blocks>" if isinstance(value, list) else "<text>"


Text = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextBlock], Tag("<blocks>")], Discriminator(_content_tag)
]


class ToolResultBlock(Block):
    """The result of a call. A template has no place for `is_error`: the text tells it."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"toolset_name": ()}

    type: Literal["tool_result"]
    tool_use_id: str
    content: Text | None = None
    is_error: bool | None = None

    def to_turn(self) -> dict[str, Any]:
        """The template's message."""
        text = text_of(self.content or "")
        return {
            "role": "tool",
            "tool_call_id": self.tool_use_id,
            "content": f"Error: {text}" if self.is_error else text,
        }


def _by_type(*kinds: str) -> Discriminator:
    """Choose a block by its type; one that there isn't is an error of the first kind's `type`."""

    def tag(value: Any) -> str:
        kind = value.get("type") if isinstance(value, dict) else None
        return f"<{kind if kind in kinds else kinds[0]}>"

    return Discriminator(tag)


UserBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ToolResultBlock, Tag("<tool_result>")],
    _by_type("text", "tool_result"),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")],
    _by_type("text", "thinking", "tool_use"),
]
UserContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[UserBlock], Field(min_length=1), Tag("<blocks>")],
    Discriminator(_content_tag),
]
AssistantContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[AssistantBlock], Tag("<blocks>")], Discriminator(_content_tag)
]


class SystemTurn(Body):
    """Instructions in the middle of a conversation."""

    role: Literal["system"]
    content: Text

    def to_turns(self) -> list[dict[str, Any]]:
        """The template's messages."""
        return [{"role": "system", "content": text_of(self.content)}]


class UserTurn(Body):
    """What the user says, and results of calls."""

    role: Literal["user"]
    content: UserContent

    def to_turns(self) -> list[dict[str, Any]]:
        """The template's messages: one for each result, and one for the text."""
        if isinstance(self.content, str):
            return [{"role": "user", "content": self.content}]
        results = [block.to_turn() for block in self.content if isinstance(block, ToolResultBlock)]
        texts = [block for block in self.content if isinstance(block, TextBlock)]
        return results + ([{"role": "user", "content": text_of(texts)}] if texts else [])


class AssistantTurn(Body):
    """What the model said earlier."""

    role: Literal["assistant"]
    content: AssistantContent

    def to_turns(self) -> list[dict[str, Any]]:
        """The template's message."""
        blocks = [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        turn: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(block.text for block in blocks if isinstance(block, TextBlock)),
        }
        if thoughts := [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]:
            turn["reasoning_content"] = "".join(thoughts)
        if calls := [block.to_call() for block in blocks if isinstance(block, ToolUseBlock)]:
            turn["tool_calls"] = calls
        return [turn]


def _role_tag(value: Any) -> str:
    role = value.get("role") if isinstance(value, dict) else None
    return f"<{role}>" if role in ("system", "assistant") else "<user>"


Turn = Annotated[
    Annotated[SystemTurn, Tag("<system>")]
    | Annotated[UserTurn, Tag("<user>")]
    | Annotated[AssistantTurn, Tag("<assistant>")],
    Discriminator(_role_tag),
]


def text_of(content: str | list[TextBlock]) -> str:
    """The text of a content; blocks are joined by line ends."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
