"""Lines of JSON → examples to learn from: checked, without duplicates, split into a train and a held-out part by hash.

A line is {"text": "…"} or {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}. What
gateway collects has the members of NOTES beside it; a line whose label is "bad" is left out.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError

ROLES = ("system", "user", "assistant", "tool")
NOTES = ("label", "id", "model", "time", "version", "choice", "owner", "user", "finish_reason", "prompt_chars")
LABELS = ("good", "bad", None)
ON_BAD = ("refuse", "skip")
SHOWN = 5  # bad lines that a message names
MAX_LINE_CHARS = 1_000_000


@dataclass(frozen=True)
class Lesson:
    """One line. line: its number, from 1. messages: of a chat, () for a text. key: SHA-256 of what it says.

    The key doesn't change with white space, Unicode's form or the order of JSON's members.
    """

    line: int
    key: str
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    def is_held_out(self, share: float) -> bool:
        """Whether it is for the gate, not for training: `share` of all keys are, whatever file they stand in."""
        return int(self.key[:8], 16) < share * 2**32

    def plain(self) -> str:
        """What it says, without roles."""
        return self.text or "\n\n".join(content for _, content in self.messages)


@dataclass(frozen=True)
class Lessons:
    """A file's examples, without duplicates. sha256: of the file. bad: (line, reason) of each line that was skipped."""

    path: Path
    sha256: str
    examples: tuple[Lesson, ...]
    bad: tuple[tuple[int, str], ...] = ()
    num_duplicates: int = 0
    num_labelled_bad: int = 0

    def train(self, share: float, without: Collection[str] = ()) -> tuple[Lesson, ...]:
        """Those to train on; those whose keys are in `without` are left out."""
        return tuple(one for one in self.examples if not one.is_held_out(share) and one.key not in without)

    def held_out(self, share: float) -> tuple[Lesson, ...]:
        """Those that the gate judges by."""
        return tuple(one for one in self.examples if one.is_held_out(share))

    @property
    def keys(self) -> frozenset[str]:
        """The keys of all."""
        return frozenset(one.key for one in self.examples)

    def describe(self) -> str:
        """One line for the user."""
        left_out = {
            "duplicates": self.num_duplicates,
            "labelled bad": self.num_labelled_bad,
            "skipped": len(self.bad),
        }
        told = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
        return f"{self.path}: {len(self.examples)} examples" + (f" ({told})" if told else "")


def read_examples(path: Path, on_bad: str = "refuse") -> Lessons:
    """Read a file of JSON lines; empty lines are nothing.

    on_bad: "refuse" raises if a line is bad, "skip" leaves it out.

    Raises:
        BuildError: the file can't be read, a line is bad, or none is left.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path}: {error.strerror}; give a file of JSON lines") from error
    found: dict[str, Lesson] = {}
    bad: list[tuple[int, str]] = []
    num_duplicates = num_labelled_bad = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            example, label = _read(number, line)
        except ValueError as error:
            bad.append((number, str(error)))
            continue
        if label == "bad":
            num_labelled_bad += 1
        elif found.setdefault(example.key, example) is not example:
            num_duplicates += 1
    if bad and on_bad == "refuse":
        told = "; ".join(f"line {number}: {reason}" for number, reason in bad[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise BuildError(f"{path}: {told}{more}; correct the lines, or leave them out with --bad-lines skip")
    if not found:
        raise BuildError(f"{path} has no example to learn from ({len(bad)} bad lines, {num_labelled_bad} labelled bad)")
    return Lessons(path, sha256(data).hexdigest(), tuple(found.values()), tuple(bad), num_duplicates, num_labelled_bad)


def _read(number: int, line: bytes) -> tuple[Lesson, str | None]:
    """One line's example and its label. Raises `ValueError` with the reason why it is none."""
    try:
        values = json.loads(line.decode("utf-8"), object_pairs_hook=_without_twins)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError('it is no object: {"text": …} or {"messages": […]}')
    if unknown := sorted(set(values) - {"text", "messages", *NOTES}):
        raise ValueError(f"it has the unknown member {unknown[0]!r}")
    if ("text" in values) == ("messages" in values):
        raise ValueError("it must have text or messages, one of the two")
    label = values.get("label")
    if not isinstance(label, str | None) or label not in LABELS:
        raise ValueError(f'label is {label!r}, must be "good" or "bad"')
    if "text" in values:
        text = _content(values["text"], "text")
        return Lesson(number, _key(text), text=text), label
    messages = _messages(values["messages"])
    return Lesson(number, _key(*(part for message in messages for part in message)), messages=messages), label


def _messages(values: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(values, list) or not values:
        raise ValueError("messages must be a list with a message or more")
    messages = []
    for index, message in enumerate(values):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"{where} must have role and content, and nothing else")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: role is {message['role']!r}, must be one of {', '.join(ROLES)}")
        messages.append((message["role"], _content(message["content"], f"{where}: content")))
    if messages[0][0] == "assistant":
        raise ValueError("the first message must not be the assistant's: it answers nothing")
    if messages[-1][0] != "assistant":
        raise ValueError("the last message must be the assistant's: it is what is learnt")
    return tuple(messages)


def _content(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be a string with something in it")
    if len(value) > MAX_LINE_CHARS:
        raise ValueError(f"{what} has {len(value):,} characters, at most {MAX_LINE_CHARS:,} are read")
    if "\0" in value or any(0xD800 <= ord(character) < 0xE000 for character in value):
        raise ValueError(f"{what} holds NUL or half a surrogate pair")
    return value


def _key(*parts: str) -> str:
    """The same for texts that differ in white space or Unicode's form alone."""
    normal = [" ".join(unicodedata.normalize("NFC", part).split()) for part in parts]
    return sha256(json.dumps(normal).encode()).hexdigest()


def _without_twins(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it has a member twice")
    return values
