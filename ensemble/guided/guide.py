"""One sequence's guide, and the masks of a whole batch.

What enters: the tokens that were chosen. What leaves: bit masks over the model's vocabulary. It knows nothing of where
logits come from, of sampling, of slots or of Triton.
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
# For each byte of a mask, what to add to eight logits.
_ADDENDS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_ADDENDS = _ADDENDS.astype(np.float32)


class Guide:
    """What one sequence may still write. Not thread-safe; different guides may be used from different threads."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._has_ended = False

    def accept(self, token: int) -> None:
        """Go on behind `token`, the one that was chosen; an end token ends the guide.

        Raises:
            GuideError: the mask did not allow it; the guide is of no use any more.
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
        """An independent guide in the same state, for another sample of the same prompt."""
        copied = Guide(self._matcher.deep_copy(), self._vocabulary)
        copied._has_ended = self._has_ended
        return copied

    @property
    def is_satisfied(self) -> bool:
        """Whether the text so far is valid as it stands, so that an end token is allowed."""
        return self._has_ended or self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether only end tokens are allowed from here."""
        return self._has_ended or (self._matcher.is_stopped() and not self.error)

    @property
    def error(self) -> str:
        """Why this guide is of no use, in one line; empty while it is."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def _why_not(self) -> str:
        return "it has ended" if self._has_ended else "neither text nor an end token"


def fill_masks(guides: Sequence[Guide], out: Mask) -> dict[int, GuideError]:
    """Write what each guide allows into its row of `out` [len(guides), ceil(vocab_size / 32)]: one call for all.

    Args:
        guides: distinct ones, of one compiler.
        out: C-contiguous.

    Returns:
        For each guide that can't go on (nothing is allowed, or a step costs too much), its row and why; that row of
        `out` is all zeros. The others are not disturbed.
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
        elif guide.error:  # the library then allows the end token
            errors[row] = GuideError(guide.error)
        elif not is_any:
            errors[row] = GuideError("only tokens that are no text would satisfy it")
    for row in errors:
        out[row] = 0
    return errors


def apply_mask(logits: NDArray[np.float32], mask: Mask) -> None:
    """Set `logits` [vocab_size] to -inf, in place, where `mask` [ceil(vocab_size / 32)] has no bit."""
    logits += _ADDENDS.take(mask.view(np.uint8), axis=0).reshape(-1)[: len(logits)]


def _one_line(message: str) -> str:
    """The library adds its state, behind a panic a backtrace, and regexes' errors are drawn over several lines."""
    text = re.split(r"\s<(?:state|backtrace|non-verbose/)>", message)[0]
    if text.startswith("NoExtension") or not text:
        return "no text satisfies it"
    if text.startswith("panic"):
        return "it is beyond what the library can do"
    text = text.split("\n   1 | ")[0]  # from here on it draws the grammar
    if regex_error := re.search(r"regex parse error:.*\nerror: ([^\n]+)", text, re.DOTALL):
        text = f"regex parse error: {regex_error[1]}"
    return " ".join(text.split())[:_MAX_MESSAGE_LEN]
