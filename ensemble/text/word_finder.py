"""Words to find in a text that comes in pieces: the search behind stop_words and bad_words.

An Aho-Corasick automaton: each character costs the same however many words there are, no text is kept or read twice,
and a state says how much of a word the text ends with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache

from deepseek_triton.ensemble.text.errors import TextError, utf8_text

MAX_CHARACTERS = 16_384  # of all words of a list together; building the automaton takes about a microsecond for each


class WordFinder:
    """Finds any of `words`, none of them empty. It holds no text: the caller keeps the state, 0 before the text."""

    def __init__(self, words: Sequence[str]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self._fallback = [0]  # the state of the longest shorter end of the text that begins a word
        self._longest = [0]  # the length of the longest word that ends here
        self._depth = [0]
        for word in words:
            self._add(word)
        waiting = deque(self._children[0].values())
        while waiting:
            state = waiting.popleft()
            self._longest[state] = self._longest[state] or self._longest[self._fallback[state]]
            for character, child in self._children[state].items():
                self._fallback[child] = self._step(self._fallback[state], character)
                waiting.append(child)

    def advance(self, state: int, text: str) -> tuple[int, int | None]:
        """The state after `text`, and where in it the word that begins first begins, if one ends in it.

        The place is negative where the word began in an earlier piece.
        """
        first: int | None = None
        for end, character in enumerate(text, 1):
            state = self._step(state, character)
            if length := self._longest[state]:
                first = end - length if first is None else min(first, end - length)
        return state, first

    def num_begun(self, state: int) -> int:
        """How many characters at the text's end may be the beginning of a word: the most that any word allows."""
        return self._depth[state]

    def _add(self, word: str) -> None:
        state = 0
        for depth, character in enumerate(word, 1):
            children = self._children[state]
            if character not in children:
                children[character] = len(self._children)
                self._children.append({})
                self._fallback.append(0)
                self._longest.append(0)
                self._depth.append(depth)
            state = children[character]
        self._longest[state] = len(word)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._children[state]:
            state = self._fallback[state]
        return self._children[state].get(character, 0)


def word_finder(words: Sequence[str | bytes], field: str) -> WordFinder:
    """The finder of a client's words; `field` names them in errors. Clients send the same again: some are kept.

    Raises:
        TextError: a word is empty or not UTF-8, holds U+FFFD, or they are too long together.
    """
    texts = tuple(utf8_text(word, f"{field}[{index}]") for index, word in enumerate(words))
    for index, text in enumerate(texts):
        if not text:
            raise TextError(f"{field}[{index}] is empty: leave it out")
        if "\ufffd" in text:  # every unfinished character shows as one, and passes
            raise TextError(f"{field}[{index}] holds U+FFFD, which stands for bytes that are no text: leave it out")
    if (length := sum(map(len, texts))) > MAX_CHARACTERS:
        raise TextError(f"{field} has {length} characters in all, must have at most {MAX_CHARACTERS}")
    return _cached(texts)


@lru_cache(maxsize=32)
def _cached(words: tuple[str, ...]) -> WordFinder:
    return WordFinder(words)
