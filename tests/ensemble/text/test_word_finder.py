"""The word finder against plain searches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.ensemble.text.errors import TextError
from deepseek_triton.ensemble.text.word_finder import MAX_CHARACTERS, WordFinder, word_finder

WORDS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=5)


def first_place(text: str, words: list[str]) -> int | None:
    return min((place for word in words if (place := text.find(word)) >= 0), default=None)


def longest_beginning(text: str, words: list[str]) -> int:
    return max((n for word in words for n in range(1, len(word)) if text.endswith(word[:n])), default=0)


@pytest.mark.slow
@given(words=WORDS, pieces=st.lists(st.text("abc\n", max_size=4), max_size=12))
def test_words_are_found_as_a_search_of_the_whole_text_finds_them(words: list[str], pieces: list[str]) -> None:
    finder, state, text = WordFinder(words), 0, ""
    for piece in pieces:
        state, start = finder.advance(state, piece)
        expected = first_place(text + piece, words)
        assert (None if start is None else len(text) + start) == expected
        text += piece
        if start is not None:
            return
        assert finder.num_begun(state) == longest_beginning(text, words)


@pytest.mark.slow
@given(words=WORDS, text=st.text("abc\n", max_size=30))
def test_the_search_goes_on_behind_a_word(words: list[str], text: str) -> None:
    finder, state, found = WordFinder(words), 0, []
    for character in text:
        state, start = finder.advance(state, character)
        found.append(start is not None)
    assert found == [any(text[:end].endswith(word) for word in words) for end in range(1, len(text) + 1)]


@pytest.mark.parametrize(
    ("words", "pieces", "expected"),
    [
        (["abc"], ["ab", "c"], -2),
        (["aab"], ["aa", "ab"], -1),  # the second of three
        (["ab", "abc"], ["xabc"], 1),
        (["bc", "abcd"], ["abcd"], 0),  # the one that begins first, though it ends last
        (["b", "abcd"], ["ab", "cd"], 1),  # but what the text holds now decides
        (["\n\nUser:"], ["a\n", "\n\nUser", ":"], -6),
        (["你好"], ["你", "好"], -1),
    ],
)
def test_places(words: list[str], pieces: list[str], expected: int) -> None:
    finder, state, start = WordFinder(words), 0, None
    for piece in pieces:
        assert start is None
        state, start = finder.advance(state, piece)
        if start is not None:
            break
    assert start == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], r"stop_words\[0\] is empty"),
        (["a", b""], r"stop_words\[1\] is empty"),
        ([b"\xff"], r"stop_words\[0\] is not UTF-8 \(byte 0\)"),
        (["a\ufffdb"], r"stop_words\[0\] holds U\+FFFD"),
        (["x" * MAX_CHARACTERS, "y"], f"stop_words has {MAX_CHARACTERS + 1} characters in all, must have at most"),
    ],
)
def test_words_that_cannot_be_looked_for(words: list[str | bytes], message: str) -> None:
    with pytest.raises(TextError, match=message) as caught:
        word_finder(words, "stop_words")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_bytes_are_text_and_the_same_words_share_a_finder() -> None:
    assert word_finder([b"caf\xc3\xa9"], "stop_words") is word_finder(["café"], "bad_words")
