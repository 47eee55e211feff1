"""The kind of an error, carried through a call from one model to another.

Triton 2.51's Python backend hands on an error's text and drops its code: to the caller every error is INTERNAL. A
caller that sets KIND_PARAMETER gets the kind in the text.
"""

from __future__ import annotations

import re
from typing import Literal

FailureKind = Literal["invalid", "unavailable", "internal"]
KIND_PARAMETER = "error_kind_in_text"  # a request parameter; true: the text begins with the kind

# Names of pb_utils.TritonError's codes; pb_utils is empty until Triton's stub process runs it.
ERROR_CODES: dict[FailureKind, str] = {
    "invalid": "INVALID_ARG",
    "unavailable": "UNAVAILABLE",
    "internal": "INTERNAL",
}
_MARKED = re.compile(r"\[(?P<kind>invalid|unavailable|internal)\] (?P<message>.*)", re.DOTALL)
# Errors of Triton itself that pass.
_PASSING = re.compile(r"exceeds maximum queue size|is not ready|not ready yet", re.IGNORECASE)


def with_kind(message: str, kind: FailureKind) -> str:
    """The message with its kind before it."""
    return f"[{kind}] {message}"


def split_kind(text: str) -> tuple[str, FailureKind]:
    """The message and the kind that `with_kind` put before it; Triton may have put its own words before both."""
    if (found := _MARKED.search(text)) is None:
        return text, "unavailable" if _PASSING.search(text) else "internal"
    kind: FailureKind = found["kind"]  # type: ignore[assignment]
    return found["message"], kind
