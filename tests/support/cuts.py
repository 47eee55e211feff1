"""Texts cut at any place: a streaming parser's result must not depend on the cuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import strategies as st


def pieces(text: str, cuts: Sequence[int]) -> list[str]:
    """`text` cut at the offsets `cuts`; those beyond its end cut nothing, equal ones give an empty piece."""
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(borders)]


def cuttings(max_len: int) -> st.SearchStrategy[list[int]]:
    """Offsets to cut at: everywhere, or anywhere."""
    return st.one_of(st.just(list(range(max_len))), st.lists(st.integers(0, max_len), max_size=12))
