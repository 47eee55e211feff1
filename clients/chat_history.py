"""The turns of one chat: what goes to the model, and what is dropped when they outgrow its context.

It knows messages and the engine's words for a prompt that is too long, and nothing of terminals.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from deepseek_triton.clients.messages import Message

# What the engine answers to a prompt that is too long (ensemble/engine/loop.py).
_TOO_LONG = re.compile(r"the prompt has (\d+) tokens, the context holds (\d+)")
# A trimmed chat fills at most this part of the context: the answer needs room too.
_FILLED = 0.75


class ChatHistory:
    """The system's message, if there is one, and the exchanges so far, each a question and its answer."""

    def __init__(self, system: str | None = None, context_len: int | None = None) -> None:
        self.system = system
        self.context_len = context_len  # tokens; None: unknown until a prompt is too long
        self._exchanges: list[tuple[Message, Message]] = []

    def messages(self, question: Message) -> tuple[Message, ...]:
        """What goes to the model with the next question."""
        return (*self._so_far(), question)

    def add(self, question: Message, answer: str) -> None:
        """Keep an exchange."""
        self._exchanges.append((question, Message("assistant", answer)))

    def clear(self) -> None:
        """Forget the exchanges; the system's message stays."""
        self._exchanges.clear()

    def trim(self, error: str, question: Message) -> int:
        """Drop the oldest exchanges if `error` says that the prompt is too long; returns how many were dropped.

        At least one is dropped, and as many as by the texts' lengths leave room for an answer.
        """
        match = _TOO_LONG.search(error)
        if match is None or not self._exchanges:
            return 0
        num_tokens, self.context_len = int(match[1]), int(match[2])
        tokens_per_character = num_tokens / max(_num_characters(self.messages(question)), 1)
        num_dropped = 0
        while self._exchanges:
            del self._exchanges[0]
            num_dropped += 1
            if _num_characters(self.messages(question)) * tokens_per_character <= _FILLED * self.context_len:
                break
        return num_dropped

    def save(self, path: Path) -> None:
        """Write the chat as JSON, in the form of an OpenAI request.

        Raises:
            OSError: it can't be written.
        """
        messages = [asdict(message) for message in self._so_far()]
        text = json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n"
        path.expanduser().write_text(text, encoding="utf-8")

    def _so_far(self) -> list[Message]:
        system = [] if self.system is None else [Message("system", self.system)]
        return [*system, *(message for exchange in self._exchanges for message in exchange)]


def _num_characters(messages: tuple[Message, ...]) -> int:
    return sum(len(message.content) for message in messages)
