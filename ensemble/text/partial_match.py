"""Search for markers in streamed text, including a partial match at the end of the text."""

from __future__ import annotations

from collections.abc import Iterable


def find_first(text: str, markers: Iterable[str]) -> tuple[int, str] | None:
    """Return the index and the text of the marker that begins first; None if there is none."""
    found = [(index, marker) for marker in markers if (index := text.find(marker)) >= 0]
    return min(found, default=None)


def partial_len(text: str, markers: Iterable[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of a marker and must be held back."""
    return max((_overlap_len(text, marker) for marker in markers), default=0)


def _overlap_len(text: str, marker: str) -> int:
    longest = min(len(text), len(marker) - 1)
    # A marker's first character is rare in text, so searching for it first avoids most comparisons.
    start = text.find(marker[0], len(text) - longest)
    while start >= 0:
        if marker.startswith(text[start:]):
            return len(text) - start
        start = text.find(marker[0], start + 1)
    return 0
