"""Where one sequence's text ends: stop words, found across token borders while the text is made.

Token ids enter one by one. What leaves is how many of them may go to the client, whose detokenizer then gives no
character that could turn out to belong to a stop word, and at a stop how many characters to cut off. It knows nothing
of end tokens and lengths: where they end the text, every token goes out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_triton.ensemble.text.tokenizer import IncrementalDetokenizer, Tokenizer
from deepseek_triton.ensemble.text.word_finder import word_finder


@dataclass(frozen=True)
class StopState:
    """What is known after a token.

    num_safe_tokens: of the tokens pushed, so many may be sent before the end. Never fewer than before.
    is_stop: the text holds a stop word: send every token, with `final`, and cut.
    num_cut_chars: to take off the end of the text of all tokens, and so off that of the final piece.
    """

    num_safe_tokens: int
    is_stop: bool = False
    num_cut_chars: int = 0


class StopMatcher:
    """Looks for `stop_words` in the text of one sequence's generated tokens, end tokens left out.

    The text ends before the stop word that begins first. Whole tokens are held back: those whose text reaches into an
    end of the text that begins a stop word.

    Raises:
        TextError: a stop word can't be looked for.
    """

    def __init__(self, tokenizer: Tokenizer, stop_words: Sequence[str | bytes]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._finder = word_finder(stop_words, "stop_words")
        self._state = 0
        self._text_len = 0  # of what a detokenizer gives for the tokens so far, were more to follow
        self._held: deque[int] = deque()  # the text's length after each token that is not safe yet
        self._num_safe = 0
        self._is_stop = False

    def push(self, token: int) -> StopState:
        """Take the next token. Nothing may follow a stop."""
        if self._is_stop:
            raise RuntimeError("push after a stop: make a new StopMatcher for each sequence")
        text = self._detokenizer.push((token,))
        state, start = self._finder.advance(self._state, text)
        if self._detokenizer.is_in_byte_run:  # not given out yet; but it would be, if the text ended here
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
