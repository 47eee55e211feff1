"""The messages of a chat, checked as far as possible without the model's chat template.

A message of plain text is a `Message`. Anything else in OpenAI's form (text in parts, tool calls, tool results) stays
the mapping that was given: the model's template decides what it understands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepseek_triton.clients.checks import check_text, json_copy, json_text


@dataclass(frozen=True)
class Message:
    """One message of a chat. The chat template defines the roles: usually system, user and assistant."""

    role: str
    content: str

    def __post_init__(self) -> None:
        """Check both texts."""
        if not self.role:
            raise ValueError(f"role must not be empty, got {self.role!r}")
        check_text("role", self.role)
        check_text("content", self.content)


Turn = Message | Mapping[str, Any]


def read_messages(messages: Sequence[Turn]) -> tuple[Turn, ...]:
    """The messages, checked and copied; those of plain text as a `Message`. `ValueError` names an invalid one."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages must be a list of messages, got {messages!r}")
    if not messages:
        raise ValueError(f"messages must not be empty, got {messages!r}")
    return tuple(_read(message, f"messages[{i}]") for i, message in enumerate(messages))


def messages_json(messages: Sequence[Turn], **more: Any) -> str:
    """The value of the tensor `messages`; entries of `more` (tools, chat_template_kwargs) that are None are omitted."""
    turns = [asdict(message) if isinstance(message, Message) else message for message in messages]
    return json_text(
        "messages", {"messages": turns, **{key: value for key, value in more.items() if value is not None}}
    )


def _read(message: Turn, where: str) -> Turn:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'{where} must be {{"role": …, "content": …}}, got {message!r}')
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not isinstance(calls, list | tuple):
        raise ValueError(f"{where}.tool_calls must be a list of calls, got {calls!r}")
    if not isinstance(content, str | list | tuple) and not (content is None and calls):
        raise ValueError(f"{where}.content must be text or a list of parts, got {content!r}")
    if set(message) == {"role", "content"} and isinstance(content, str):
        return Message(message["role"], content)
    copy: dict[str, Any] = json_copy(where, dict(message))
    if not copy["role"]:
        raise ValueError(f"{where}.role must not be empty, got {message['role']!r}")
    return copy
