"""Multi-pattern search in streamed text with an Aho-Corasick automaton, for stop_words and bad_words.

The cost per character doesn't depend on the number of words, and no text is stored or read twice. The automaton's state
says how many characters at the end of the text may begin a word.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache

from deepseek_triton.ensemble.text.errors import TextError, utf8_text

MAX_CHARACTERS = 16_384  # of all words together; the automaton takes about 1 µs per character to build


class WordFinder:
    """Finds any of `words`, none of them empty. The caller keeps the state, which is 0 at the start of the text."""

    def __init__(self, words: Sequence[str]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self._fallback = [0]  # by state: the state of its longest proper suffix that begins a word
        self._longest = [0]  # by state: the length of the longest word that ends there, 0 for none
        self._depth = [0]  # by state: the number of characters that lead to it
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
        """Return the state after `text`, and the start index of the first word that ends in it; None if none does.

        Of several words the one that begins first counts. The index is negative if the word began in an earlier piece.
        """
        first: int | None = None
        for end, character in enumerate(text, 1):
            state = self._step(state, character)
            if length := self._longest[state]:
                first = end - length if first is None else min(first, end - length)
        return state, first

    def num_begun(self, state: int) -> int:
        """Return how many characters at the end of the text may be the beginning of a word."""
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
    """Return the finder for a client's words; `field` names them in errors. The last 32 finders are cached.

    Raises:
        TextError: a word is empty, isn't UTF-8 or holds U+FFFD, or the words are too long in total.
    """
    texts = tuple(utf8_text(word, f"{field}[{index}]") for index, word in enumerate(words))
    for index, text in enumerate(texts):
        if not text:
            raise TextError(f"{field}[{index}] is empty: leave it out")
        if "\ufffd" in text:  # each incomplete character decodes to U+FFFD for a while, and would match
            raise TextError(f"{field}[{index}] holds U+FFFD, which stands for invalid bytes: remove it")
    if (length := sum(map(len, texts))) > MAX_CHARACTERS:
        raise TextError(f"{field} has {length} characters in all, must have at most {MAX_CHARACTERS}")
    return _cached(texts)


@lru_cache(maxsize=32)
def _cached(words: tuple[str, ...]) -> WordFinder:
    return WordFinder(words)
