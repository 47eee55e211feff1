"""A scoring request's text and labels → a row of token ids.

What enters is what the client sent, what leaves is a ScoreRow and whose its targets are. Labels are encoded by
themselves, behind the prompt's ids: no token joins the end of a prompt with the start of a label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepseek_triton.ensemble.scoring.profile import ScoringProfile, ScoringProfileError, check_labels
from deepseek_triton.ensemble.scoring.rows import Ints, ScoreRow, make_row
from deepseek_triton.ensemble.text.errors import TextError, utf8_text
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

CACHED_LABEL_SETS = 256
# Texts that begin as differently as texts do: a tokenizer may join the template's last characters with their first.
BEGINNINGS = (
    "x",
    "The",
    " x",
    "  x",
    "\nx",
    "\n\nx",
    "\tx",
    "1",
    "-",
    "'s",
    '"x',
    ".",
    "(x",
    "/x",
    "_x",
    "é",
    "中",
    "🙂",
)


class Prompter:
    """Makes rows by one profile and one tokenizer."""

    def __init__(self, profile: ScoringProfile, tokenizer: Tokenizer) -> None:
        self.profile = profile
        self._tokenizer = tokenizer
        self._label_ids: dict[tuple[str, ...], list[Ints]] = {}

    def labels_of(self, labels: Sequence[str | bytes] | None) -> tuple[str, ...]:
        """A request's labels, or the profile's own.

        Raises:
            ScoringProfileError, TextError: there are none, or they can't be used.
        """
        if labels is None:
            if not self.profile.labels:
                raise ScoringProfileError("labels is missing, and the model was built without: send at least 2")
            return self.profile.labels
        own = tuple(utf8_text(label, f"labels[{index}]") for index, label in enumerate(labels))
        check_labels(own, self.profile.max_labels)
        return own

    def row(
        self, text: str | bytes | None, messages: str | bytes | None, labels: tuple[str, ...]
    ) -> tuple[ScoreRow, Ints, int]:
        """One text's row, the label of each of its targets, and how many tokens its prompt has.

        Raises:
            ScoringProfileError, TextError: text or labels are at fault, or too long.
        """
        prompt = self._prompt(text, messages)
        # A chat template ends where the answer begins; only a prompt of our own wants the prefix.
        prefix = self.profile.label_prefix if messages is None or self.profile.is_chat else ""
        row, targets = make_row(prompt, self._encoded(prefix, labels))
        limit = self.profile.max_seq_len
        if len(row) > limit:
            others = len(row) - len(prompt)
            raise TextError(
                f"the prompt has {len(prompt)} tokens, its labels {others} more; at most {limit} in all: shorten it"
            )
        return row, targets, len(prompt)

    def prefix_ids(self) -> list[int]:
        """The ids that the prompts of texts begin with, as far as a few different texts tell."""
        prompts: list[list[int]] = [self._prompt(text, None).tolist() for text in BEGINNINGS]
        shortest = min(map(len, prompts)) - 1  # something of a prompt's own has to be left to ask about
        differs = (i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1)
        return prompts[0][: next(differs, shortest)]

    def _prompt(self, text: str | bytes | None, messages: str | bytes | None) -> Ints:
        if (text is None) == (messages is None):
            raise TextError("give either text_input or messages")
        if messages is not None:
            return self._tokenizer.encode_messages(messages)
        assert text is not None
        own = utf8_text(text, "text_input")
        if not own.strip():
            raise TextError("text_input is empty: send at least one character, or messages")
        if self.profile.is_chat:
            return self._tokenizer.encode_messages(self.profile.fill_messages(own))
        return self._tokenizer.encode(self.profile.fill(own))

    def _encoded(self, prefix: str, labels: tuple[str, ...]) -> list[Ints]:
        """The ids of each label behind the prefix, without the markers of a text's start and end."""
        key = (prefix, *labels)
        if key not in self._label_ids:
            ids = [self._tokenizer.encode_continuation(prefix + label) for label in labels]
            spellings: dict[bytes, str] = {}
            for label, own in zip(labels, ids, strict=True):
                if not len(own):
                    raise ScoringProfileError(f"label {label!r} has no tokens: choose another")
                # Two texts that the tokenizer makes one of would share their probability by chance.
                if (other := spellings.setdefault(np.asarray(own).tobytes(), label)) != label:
                    raise ScoringProfileError(f"labels {other!r} and {label!r} are the same tokens: drop one")
            while len(self._label_ids) >= CACHED_LABEL_SETS:
                del self._label_ids[next(iter(self._label_ids))]
            self._label_ids[key] = ids
        return self._label_ids[key]
