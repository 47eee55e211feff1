"""Converts a scoring request's text and labels to a ScoreRow and the label of each of its targets.

Labels are tokenized separately and appended to the prompt's ids, so no token spans the end of a prompt and the start of
a label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepseek_triton.ensemble.scoring.profile import ScoringProfile, ScoringProfileError, check_labels
from deepseek_triton.ensemble.scoring.rows import Ints, ScoreRow, make_row
from deepseek_triton.ensemble.text.errors import TextError, utf8_text
from deepseek_triton.ensemble.text.tokenizer import Tokenizer

CACHED_LABEL_SETS = 256
# Texts with different first characters: a tokenizer may merge these with the template's last characters.
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
    """Makes rows with one profile and one tokenizer."""

    def __init__(self, profile: ScoringProfile, tokenizer: Tokenizer) -> None:
        self.profile = profile
        self._tokenizer = tokenizer
        self._label_ids: dict[tuple[str, ...], list[Ints]] = {}

    def labels_of(self, labels: Sequence[str | bytes] | None) -> tuple[str, ...]:
        """Return a request's labels, or the profile's.

        Raises:
            ScoringProfileError, TextError: there are no labels, or they are invalid.
        """
        if labels is None:
            if not self.profile.labels:
                raise ScoringProfileError("labels is missing, and the model has no default labels: send at least 2")
            return self.profile.labels
        own = tuple(utf8_text(label, f"labels[{index}]") for index, label in enumerate(labels))
        check_labels(own, self.profile.max_labels)
        return own

    def row(
        self, text: str | bytes | None, messages: str | bytes | None, labels: tuple[str, ...]
    ) -> tuple[ScoreRow, Ints, int]:
        """Return one text's row, the label index of each target [num_targets], and the prompt's length in tokens.

        Raises:
            ScoringProfileError, TextError: text or labels are invalid or too long.
        """
        prompt = self._prompt(text, messages)
        # A rendered chat ends where the answer begins; the prefix belongs to the profile's template.
        prefix = self.profile.label_prefix if messages is None or self.profile.is_chat else ""
        row, targets = make_row(prompt, self._encoded(prefix, labels))
        limit = self.profile.max_seq_len
        if len(row) > limit:
            others = len(row) - len(prompt)
            raise TextError(
                f"the prompt has {len(prompt)} tokens and its labels {others}; at most {limit} are allowed: shorten it"
            )
        return row, targets, len(prompt)

    def prefix_ids(self) -> list[int]:
        """Return the ids with which all prompts of the template begin, found by comparing the prompts of BEGINNINGS."""
        prompts: list[list[int]] = [self._prompt(text, None).tolist() for text in BEGINNINGS]
        shortest = min(map(len, prompts)) - 1  # the prefix must be shorter than any prompt
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
        """Return the ids of each label with the prefix before it, without BOS and EOS."""
        key = (prefix, *labels)
        if key not in self._label_ids:
            ids = [self._tokenizer.encode_continuation(prefix + label) for label in labels]
            spellings: dict[bytes, str] = {}
            for label, own in zip(labels, ids, strict=True):
                if not len(own):
                    raise ScoringProfileError(f"label {label!r} has no tokens: choose another")
                # Labels with equal ids would get equal probabilities.
                if (other := spellings.setdefault(np.asarray(own).tobytes(), label)) != label:
                    raise ScoringProfileError(f"labels {other!r} and {label!r} have the same tokens: drop one")
            while len(self._label_ids) >= CACHED_LABEL_SETS:
                del self._label_ids[next(iter(self._label_ids))]
            self._label_ids[key] = ids
        return self._label_ids[key]
