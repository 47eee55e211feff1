"""Bans tokens that would complete a bad word, however the word is split into tokens."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_triton.ensemble.text.tokenizer import IncrementalDetokenizer, Tokenizer
from deepseek_triton.ensemble.text.word_finder import word_finder


class BadWords:
    """Keeps `words` out of the text of one sequence's generated tokens; a TokenRule for the sampler.

    Raises:
        TextError: a bad word is empty, too long or not valid text.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str | bytes]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._finder = word_finder(words, "bad_words")
        self._state = 0

    def is_allowed(self, token: int) -> bool:
        """Return whether the text stays free of bad words if `token` is appended."""
        return self._finder.advance(self._state, self._detokenizer.peek((token,)))[1] is None

    def push(self, token: int) -> None:
        """Append the token that was chosen."""
        self._state, _ = self._finder.advance(self._state, self._detokenizer.push((token,)))
