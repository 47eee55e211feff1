"""The lines that are kept, as JSON: an answer in the form that `deepseek-triton learn` reads, and feedback on one.

Both begin with what identifies an answer, so that it can be found without reading the texts: within a JSON string the
quotes of `key_of` would be escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Label = Literal["good", "bad"]
Line = Mapping[str, Any]
GOOD_RATING, BAD_RATING = 4, 2  # of 1 to 5: from the one on good, up to the other bad


@dataclass(frozen=True)
class AnswerId:
    """One answer. request_id: of its HTTP request. choice: its index there. owner: the pseudonym of who asked."""

    request_id: str
    choice: int
    owner: str

    @classmethod
    def of(cls, line: Line) -> AnswerId:
        """That of a line which was read."""
        return cls(line["id"], line["choice"], line["owner"])

    def form(self) -> dict[str, Any]:
        """The members with which its lines begin."""
        return {"id": self.request_id, "choice": self.choice, "owner": self.owner}


@dataclass(frozen=True)
class CollectedAnswer:
    """A finished answer. user: the pseudonym of the user that the request names; "": none. time: in ISO 8601, UTC.

    messages: (role, content) of the chat before the answer; () for a text, which is `prompt`.
    """

    id: AnswerId
    user: str
    model: str
    version: str
    time: str
    finish_reason: str
    text: str
    prompt: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def num_chars(self) -> int:
        """Characters of all its texts."""
        return len(self.text) + len(self.prompt) + sum(len(content) for _, content in self.messages)

    def texts(self) -> list[str]:
        """What is redacted. A text is redacted with its prompt too, since what is removed may begin in the prompt."""
        if self.messages:
            return [*(content for _, content in self.messages), self.text]
        return [self.prompt, self.prompt + self.text]

    def line(self, redacted: list[str]) -> dict[str, Any]:
        """Its line, with `redacted` instead of its texts."""
        head = {
            **self.id.form(), "user": self.user, "model": self.model, "version": self.version, "time": self.time,
            "finish_reason": self.finish_reason,
        }  # fmt: skip
        if self.messages:
            roles = [*(role for role, _ in self.messages), "assistant"]
            pairs = zip(roles, redacted, strict=True)
            return {**head, "messages": [{"role": role, "content": content} for role, content in pairs]}
        prompt, text = redacted
        return {**head, "prompt_chars": len(prompt) if text.startswith(prompt) else None, "text": text}


@dataclass(frozen=True)
class Feedback:
    """What the one who asked says of an answer. correction: the answer that it should have been; "": none."""

    id: AnswerId
    time: str
    label: Label | None
    correction: str = ""
    comment: str = ""

    @property
    def num_chars(self) -> int:
        """Characters of its texts."""
        return len(self.correction) + len(self.comment)

    def texts(self) -> list[str]:
        """What is redacted."""
        return [self.correction, self.comment]

    def line(self, redacted: list[str]) -> dict[str, Any]:
        """Its line, with `redacted` instead of its texts."""
        correction, comment = redacted
        said = {"time": self.time, "label": self.label, "correction": correction, "comment": comment}
        return {**self.id.form(), **said}


def encode(line: Line) -> bytes:
    """The line's bytes, with its end. Raises `UnicodeEncodeError` for half a surrogate pair."""
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def key_of(answer: AnswerId) -> bytes:
    """The bytes with which the lines of this answer begin, and which occur nowhere else."""
    return encode(answer.form())[:-2] + b","


def decode_all(data: bytes) -> Iterator[dict[str, Any]]:
    """The lines of a file; one that was torn by a kill or isn't ours is passed over."""
    for text in data.split(b"\n"):
        try:
            line = json.loads(text)
            AnswerId.of(line)
        except (KeyError, TypeError, ValueError):
            continue
        yield line


def label_of(label: Label | None, rating: int | None) -> Label | None:
    """The label that a label or a rating from 1 to 5 means."""
    if label is not None or rating is None:
        return label
    return "good" if rating >= GOOD_RATING else "bad" if rating <= BAD_RATING else None
