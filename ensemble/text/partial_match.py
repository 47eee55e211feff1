"""Markers in streamed text: where the first stands, and how much of the end might still become one.

What enters: a text and the spellings to look for. It knows nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable


def find_first(text: str, markers: Iterable[str]) -> tuple[int, str] | None:
    """Where the earliest of `markers` begins, and which it is; None where the text holds none."""
    found = [(index, marker) for marker in markers if (index := text.find(marker)) >= 0]
    return min(found, default=None)


def partial_len(text: str, markers: Iterable[str]) -> int:
    """How many characters at the end of `text` could be the beginning of a marker: hold them back."""
    return max((_overlap_len(text, marker) for marker in markers), default=0)


def _overlap_len(text: str, marker: str) -> int:
    longest = min(len(text), len(marker) - 1)
    # A marker's first character is rare in text: one look for it spares the comparisons.
    start = text.find(marker[0], len(text) - longest)
    while start >= 0:
        if marker.startswith(text[start:]):
            return len(text) - start
        start = text.find(marker[0], start + 1)
    return 0
