"""Finds stop words in one sequence's generated text, also across token boundaries.

Token ids enter one by one. The result says how many of them may be sent: their text holds no character that could
belong to a stop word. At a stop it says how many characters to cut off. This module knows nothing of end tokens and
length limits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_triton.ensemble.text.tokenizer import IncrementalDetokenizer, Tokenizer
from deepseek_triton.ensemble.text.word_finder import word_finder


@dataclass(frozen=True)
class StopState:
    """The result of one push.

    num_safe_tokens: number of tokens, of all that were pushed, that may be sent. It never decreases.
    is_stop: the text holds a stop word. Send every token, detokenize with `final`, and cut.
    num_cut_chars: number of characters to remove from the end of the text.
    """

    num_safe_tokens: int
    is_stop: bool = False
    num_cut_chars: int = 0


class StopMatcher:
    """Searches the text of one sequence's generated tokens, without end tokens, for `stop_words`.

    The text ends before the stop word that begins first. A token is held back while its text may be part of a stop
    word.

    Raises:
        TextError: a stop word is empty, too long or not valid text.
    """

    def __init__(self, tokenizer: Tokenizer, stop_words: Sequence[str | bytes]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._finder = word_finder(stop_words, "stop_words")
        self._state = 0
        self._text_len = 0  # in characters, without text that the detokenizer holds back
        self._held: deque[int] = deque()  # the text's length after each token that is held back
        self._num_safe = 0
        self._is_stop = False

    def push(self, token: int) -> StopState:
        """Append the next token. Nothing may be pushed after a stop."""
        if self._is_stop:
            raise RuntimeError("push after a stop: make a new StopMatcher for each sequence")
        text = self._detokenizer.push((token,))
        state, start = self._finder.advance(self._state, text)
        if self._detokenizer.is_in_byte_run:  # the detokenizer holds this text back, but it may complete a stop word
            _, start = self._finder.advance(self._state, text + self._detokenizer.peek())
        if start is not None:
            self._is_stop = True
            num_cut = len(text) + len(self._detokenizer.peek()) - start
            return StopState(self._num_safe, is_stop=True, num_cut_chars=num_cut)
        self._state = state
        self._text_len += len(text)
        self._held.append(self._text_len)
        safe_len = self._text_len - self._finder.num_begun(state)
        while self._held and self._held[0] <= safe_len:
            self._held.popleft()
            self._num_safe += 1
        return StopState(self._num_safe)
