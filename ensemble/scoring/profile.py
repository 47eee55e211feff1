"""The scoring profile, scoring.json: the prompt template, the labels and the limits of a scoring model.

Builders write it into the directories of the tokenizer and the scorer. It knows nothing of token ids or probabilities.
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
# mean: a label's log probability divided by its number of tokens, so that short labels, or labels that are prefixes of
# others, have no advantage. sum: a label's log probability as a continuation.
Normalisation = Literal["mean", "sum"]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)


class ScoringProfileError(ValueError):
    """A scoring profile or a request's labels are invalid; the message is one line."""


@dataclass(frozen=True)
class ScoringProfile:
    """The settings of scoring.

    template: the prompt; contains {text} once, which the request's text replaces.
    is_chat: the filled template is a user message, rendered with the checkpoint's chat template.
    labels: default labels; empty: each request must have its own.
    label_prefix: text before each label, such as the space after "Answer:".
    normalisation: of the scores.
    max_seq_len: maximum tokens of a prompt with its labels.
    max_request_tokens: maximum of a request's rows times the tokens of its longest row; 0: the batch size limits it.
    max_labels: maximum labels of a request.
    format: version of the file.
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
        """Return the template with `text` inserted; other braces have no meaning."""
        before, after = self.template.split(PLACE)
        return f"{before}{text}{after}"

    def fill_messages(self, text: str) -> str:
        """Return the filled template as a chat of one user message, in JSON."""
        return json.dumps([{"role": "user", "content": self.fill(text)}])

    def save(self, directory: Path) -> None:
        """Write scoring.json into `directory`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> ScoringProfile:
        """Read `directory`'s scoring.json.

        Raises:
            ScoringProfileError: the file is missing, unreadable or of another version.
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
    """Check that there are at least two labels, all distinct and not empty.

    Raises:
        ScoringProfileError: names the first error.
    """
    if len(labels) < 2:
        raise ScoringProfileError(f"labels holds {len(labels)} label, must hold at least 2")
    if len(labels) > max_labels:
        raise ScoringProfileError(f"labels holds {len(labels)} labels, must hold at most {max_labels}")
    seen: set[str] = set()
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ScoringProfileError(f"labels[{index}] is {label!r}, must be text")
        if label in seen:
            raise ScoringProfileError(f"labels[{index}] is {label!r}, which is a duplicate")
        seen.add(label)
