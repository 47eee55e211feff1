"""The guide of one sequence.

A guide takes the tokens that were chosen and gives bit masks over the model's vocabulary. It knows nothing of logits,
sampling, slots or Triton.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.guided.errors import GuideError
from deepseek_triton.ensemble.guided.vocabulary import Mask, Vocabulary

if TYPE_CHECKING:
    import llguidance

_MAX_MESSAGE_LEN = 300
# For each value of a mask's byte [256], the addends of its eight logits [8]: 0 if allowed, else -inf.
_ADDENDS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_ADDENDS = _ADDENDS.astype(np.float32)


class Guide:
    """The state of one sequence's guide. It isn't thread-safe; different guides may be used from different threads."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._has_ended = False

    def check(self, token: int) -> None:
        """Check that `token` is text, or an end token where the guide is satisfied; whether it fits, `accept` tells.

        Raises:
            GuideError: it is neither.
        """
        if self._has_ended or not self._vocabulary.is_allowed(token):
            raise GuideError(f"token {token} is not allowed by the guide: {self._why_not()}")
        if token in self._vocabulary.end_ids and not self._matcher.is_accepting():
            raise GuideError(f"end token {token} came before the guide was satisfied")

    def accept(self, token: int) -> None:
        """Advance by `token`, the one that was chosen; an end token ends the guide. Holds Python's lock meanwhile.

        Raises:
            GuideError: the mask doesn't allow the token; the guide can't be used any more.
        """
        self.check(token)
        if token in self._vocabulary.end_ids:
            self._has_ended = True
        elif not self._matcher.consume_token(token):
            raise GuideError(f"token {token} is not allowed by the guide: {self.error}")

    def mask(self) -> Mask:
        """Return which tokens may come next, uint32 [ceil(vocab_size / 32)]. Releases Python's lock meanwhile.

        Raises:
            GuideError: no token may come, or the step exceeds one of llguidance's limits.
        """
        vocabulary = self._vocabulary
        if self._has_ended:
            return vocabulary.end_mask.copy()
        mask = np.zeros(vocabulary.num_words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        mask &= vocabulary.allowed_mask
        if error := self.error:  # llguidance allows the end token after an error
            raise GuideError(error)
        if not mask.any():
            raise GuideError("only special tokens would satisfy it")
        return mask

    def copy(self) -> Guide:
        """Return an independent guide in the same state, for another sequence of the same prompt."""
        copied = Guide(self._matcher.deep_copy(), self._vocabulary)
        copied._has_ended = self._has_ended
        return copied

    @property
    def is_satisfied(self) -> bool:
        """Whether the text so far is valid, so that an end token is allowed."""
        return self._has_ended or self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether only end tokens are allowed next."""
        return self._has_ended or (self._matcher.is_stopped() and not self.error)

    @property
    def error(self) -> str:
        """The reason why this guide can't be used any more, in one line; empty if it can."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def _why_not(self) -> str:
        return "the guide has ended" if self._has_ended else "it is neither text nor an end token"


def apply_mask(logits: NDArray[np.float32], mask: Mask) -> None:
    """Set `logits` [vocab_size] to -inf, in place, where the bit in `mask` [ceil(vocab_size / 32)] is 0."""
    logits += _ADDENDS.take(mask.view(np.uint8), axis=0).reshape(-1)[: len(logits)]


def _one_line(message: str) -> str:
    """Shorten a message of llguidance, which may hold its state, a backtrace or a drawing of the grammar."""
    text = re.split(r"\s<(?:state|backtrace|non-verbose/)>", message)[0]
    if text.startswith("NoExtension") or not text:
        return "no text satisfies it"
    if text.startswith("panic"):
        return "the guided decoding library can't handle it"
    text = text.split("\n   1 | ")[0]  # the grammar's source with markers follows
    if regex_error := re.search(r"regex parse error:.*\nerror: ([^\n]+)", text, re.DOTALL):
        text = f"regex parse error: {regex_error[1]}"
    return " ".join(text.split())[:_MAX_MESSAGE_LEN]
