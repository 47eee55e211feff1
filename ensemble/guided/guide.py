"""The guide of one sequence, and the token masks of a batch.

A guide takes the tokens that were chosen and gives bit masks over the model's vocabulary. It knows nothing of logits,
sampling, slots or Triton.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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

    def accept(self, token: int) -> None:
        """Advance by `token`, the one that was chosen; an end token ends the guide.

        Raises:
            GuideError: the mask doesn't allow the token; the guide can't be used any more.
        """
        if self._has_ended or not self._vocabulary.is_allowed(token):
            raise GuideError(f"token {token} is not allowed by the guide: {self._why_not()}")
        if token in self._vocabulary.end_ids:
            if not self._matcher.is_accepting():
                raise GuideError(f"end token {token} came before the guide was satisfied")
            self._has_ended = True
        elif not self._matcher.consume_token(token):
            raise GuideError(f"token {token} is not allowed by the guide: {self.error}")

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


def fill_masks(guides: Sequence[Guide], out: Mask) -> dict[int, GuideError]:
    """Write each guide's mask into its row of `out` uint32 [len(guides), ceil(vocab_size / 32)].

    Args:
        guides: distinct guides of one compiler.
        out: C-contiguous.

    Returns:
        The errors by row, of guides that allow no token or whose step exceeds a limit. Their rows of `out` are zeros;
        other rows aren't affected.
    """
    if not guides:
        return {}
    vocabulary = guides[0]._vocabulary
    if out.shape != (len(guides), vocabulary.num_words) or out.dtype != np.uint32 or not out.flags.c_contiguous:
        raise ValueError(f"out must be uint32 [{len(guides)}, {vocabulary.num_words}], C-contiguous")
    vocabulary.fill([guide._matcher for guide in guides], out)
    out &= vocabulary.allowed_mask
    errors = {}
    for row, (guide, is_any) in enumerate(zip(guides, out.any(axis=1), strict=True)):
        if guide._has_ended:
            out[row] = vocabulary.end_mask
        elif guide.error:  # llguidance allows the end token after an error
            errors[row] = GuideError(guide.error)
        elif not is_any:
            errors[row] = GuideError("only special tokens would satisfy it")
    for row in errors:
        out[row] = 0
    return errors


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
