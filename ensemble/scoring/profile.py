"""scoring.json: how a text becomes a prompt, and which labels it is scored against, as data.

Builders write it beside the tokenizer and the scorer of a scoring model. It knows templates and limits; it knows
nothing about token ids or probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

FILE_NAME = "scoring.json"
FORMAT = 1
PLACE = "{text}"
# mean: a label's log-probability for each of its tokens, so that labels of different lengths compete fairly, and one
# that begins like another doesn't always win. sum: its log-probability as a continuation, as it is.
Normalisation = Literal["mean", "sum"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)


class ScoringProfileError(ValueError):
    """A scoring profile, or a request's labels, that can't be used; one line."""


@dataclass(frozen=True)
class ScoringProfile:
    """How requests are scored.

    template: the prompt, with {text} once where a request's text goes. is_chat: the filled template is a user's
    message, put through the checkpoint's chat template. labels: where a request brings none; empty: it must.
    label_prefix: stands before each label, the space after "Answer:" say. max_seq_len: tokens of a prompt and its
    labels. max_request_tokens: rows of a request times its longest row's tokens; 0: no limit but the batch size.
    max_labels: in one request.
    """

    template: str = PLACE
    is_chat: bool = False
    labels: tuple[str, ...] = ()
    label_prefix: str = " "
    normalisation: Normalisation = "mean"
    max_seq_len: int = 2048
    max_request_tokens: int = 0
    max_labels: int = 256
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.template.count(PLACE) != 1:
            raise ScoringProfileError(f"template is {self.template!r}, must hold {PLACE} once, where the text goes")
        if self.normalisation not in NORMALISATIONS:
            raise ScoringProfileError(
                f"normalisation is {self.normalisation!r}, must be one of {', '.join(NORMALISATIONS)}"
            )
        if self.labels:
            check_labels(self.labels, self.max_labels)

    def fill(self, text: str) -> str:
        """The template with `text` in its place; braces in either mean nothing."""
        before, after = self.template.split(PLACE)
        return f"{before}{text}{after}"

    def fill_messages(self, text: str) -> str:
        """The filled template as a chat of one message, in JSON."""
        return json.dumps([{"role": "user", "content": self.fill(text)}])

    def save(self, directory: Path) -> None:
        """Write scoring.json into `directory`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> ScoringProfile:
        """Read `directory`'s scoring.json.

        Raises:
            ScoringProfileError: it is missing, unreadable, or not of this version.
        """
        path = directory / FILE_NAME
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ScoringProfileError(f"{path}: {error.strerror}; build the model again") from error
        except ValueError as error:
            raise ScoringProfileError(f"{path} is not valid JSON; build the model again") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            odd = sorted(names ^ set(values)) if isinstance(values, dict) else []
            raise ScoringProfileError(f"{path} has missing or unknown fields {odd}; build the model again")
        if values["format"] != FORMAT:
            raise ScoringProfileError(
                f"{path} has format {values['format']}, this version reads {FORMAT}; build it again"
            )
        for name, default in ((field.name, field.default) for field in fields(cls)):
            kind = list if name == "labels" else type(default)
            if type(values[name]) is not kind:
                raise ScoringProfileError(f"{path}: {name} is {values[name]!r}, must be a {kind.__name__}")
        return cls(**{**values, "labels": tuple(values["labels"])})


def check_labels(labels: Sequence[str], max_labels: int) -> None:
    """Can these be told apart, and is there a choice among them?

    Raises:
        ScoringProfileError: names the first fault.
    """
    if len(labels) < 2:
        raise ScoringProfileError(
            f"labels holds {len(labels)} label, must hold at least 2: of one there is nothing to choose"
        )
    if len(labels) > max_labels:
        raise ScoringProfileError(f"labels holds {len(labels)} labels, must hold at most {max_labels}")
    seen: set[str] = set()
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ScoringProfileError(f"labels[{index}] is {label!r}, must be text")
        if label in seen:
            raise ScoringProfileError(f"labels[{index}] is {label!r}, which is there twice")
        seen.add(label)
