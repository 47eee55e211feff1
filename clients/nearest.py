"""Words that somebody may have meant: the nearest of those that there are, or all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MAX_NAMED = 10  # names that a hint lists


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The nearest of `known`, whatever the case of its letters; None if none is near."""
    by_lower = {each.lower(): each for each in known}
    match = difflib.get_close_matches(word.lower(), list(by_lower), n=1)
    return by_lower[match[0]] if match else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the nearest of `known`, or nothing."""
    match = nearest(word, known)
    return f"; did you mean {match}?" if match else ""


def name_hint(name: str, known: Sequence[str]) -> str:
    """`; did you mean a?`, or where no name is near `; there are a, b`."""
    if hint := did_you_mean(name, known):
        return hint
    if not known:
        return "; there is none"
    more = f" and {len(known) - MAX_NAMED} more" if len(known) > MAX_NAMED else ""
    verb = "is" if len(known) == 1 else "are"
    return f"; there {verb} {', '.join(known[:MAX_NAMED])}{more}"
