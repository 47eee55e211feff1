"""Reasoning and answer apart, however the text is cut."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.ensemble.text.partial_match import find_first, partial_len
from deepseek_triton.ensemble.text.reasoning import (
    CLOSE_TAG,
    OPEN_TAG,
    ReasoningSplit,
    ReasoningSplitter,
    opens_reasoning,
)
from tests.support.cuts import cuttings, pieces

# What can go wrong: tags, parts of tags, what almost is a tag, white space.
TEXTS = st.lists(
    st.sampled_from([OPEN_TAG, CLOSE_TAG, "<", "</", "<thi", "</think", "<<think>", " ", "\n\n", "think>", "a", "你"]),
    max_size=8,
).map("".join)


def split(text: str, is_open: bool, cuts: list[int] | None = None) -> ReasoningSplit:
    splitter = ReasoningSplitter(is_open)
    parts = [splitter.push(piece) for piece in pieces(text, cuts or [])] + [splitter.push("", final=True)]
    return ReasoningSplit("".join(part.reasoning for part in parts), "".join(part.text for part in parts))


def reference(text: str, is_open: bool) -> ReasoningSplit:
    """The convention once more, for a whole text."""
    found = re.fullmatch(r"(?s)(?P<tag>\s*<think>)?(?P<reasoning>.*?)(</think>(?P<text>.*))?", text)
    assert found is not None
    if not is_open and found["tag"] is None:
        return ReasoningSplit("", text)
    return ReasoningSplit(found["reasoning"], found["text"] or "")


@pytest.mark.parametrize(
    ("is_open", "text", "reasoning", "answer"),
    [
        (False, "Hello.", "", "Hello."),
        (False, "<think>\nHm.\n</think>\n\nHello.", "\nHm.\n", "\n\nHello."),
        (False, " \n<think>Hm.</think>Hello.", "Hm.", "Hello."),
        (False, " \nHello. <think>Hm.</think>", "", " \nHello. <think>Hm.</think>"),
        (False, "Hello.</think>", "", "Hello.</think>"),
        (False, "<think></think>a<think>b</think>c", "", "a<think>b</think>c"),
        (False, "<think>Hm", "Hm", ""),
        (False, "<think>Hm</thin", "Hm</thin", ""),
        (False, "<thin", "", "<thin"),
        (False, "  ", "", "  "),
        (False, "", "", ""),
        (True, "Hm.</think>Hello.", "Hm.", "Hello."),
        (True, "</think>Hello.", "", "Hello."),
        (True, "<think>Hm.</think>Hello.", "Hm.", "Hello."),  # written in vain
        (True, "a<think>b</think>c", "a<think>b", "c"),
        (True, "Hm. </think </think>Hello.", "Hm. </think ", "Hello."),
        (True, "Hm.", "Hm.", ""),
        (True, " <th", " <th", ""),
    ],
)
def test_split(is_open: bool, text: str, reasoning: str, answer: str) -> None:
    assert split(text, is_open) == ReasoningSplit(reasoning, answer)
    assert split(text, is_open, list(range(len(text)))) == ReasoningSplit(reasoning, answer)


@pytest.mark.slow
@given(text=TEXTS, is_open=st.booleans(), cuts=cuttings(60))
def test_cuts_change_nothing(text: str, is_open: bool, cuts: list[int]) -> None:
    whole = ReasoningSplitter(is_open).push(text, final=True)
    assert split(text, is_open, cuts) == whole
    assert whole == reference(text, is_open)


@given(text=TEXTS, cuts=cuttings(60))
def test_nothing_of_a_tag_leaks(text: str, cuts: list[int]) -> None:
    """At any time, the released text is a prefix of the result for the whole text."""
    whole = ReasoningSplitter(True).push(text, final=True)
    splitter = ReasoningSplitter(True)
    reasoning = answer = ""
    for piece in pieces(text, cuts):
        part = splitter.push(piece)
        reasoning, answer = reasoning + part.reasoning, answer + part.text
        assert whole.reasoning.startswith(reasoning) and whole.text.startswith(answer)


def test_text_is_given_out_at_once() -> None:
    """Holding all back until the end would satisfy the rest."""
    splitter = ReasoningSplitter(False)
    given_out = [
        splitter.push(piece) for piece in ("<th", "ink>", "Let me", " see", "<", "b></", "think", ">", "\n\n", "4")
    ]
    assert [part.reasoning for part in given_out] == ["", "", "Let me", " see", "", "<b>", "", "", "", ""]
    assert [part.text for part in given_out] == ["", "", "", "", "", "", "", "", "\n\n", "4"]


def test_other_tags() -> None:
    splitter = ReasoningSplitter(False, "[THINK]", "[/THINK]")
    assert splitter.push("[THINK]a</think>[/THINK]b", final=True) == ReasoningSplit("a</think>", "b")
    with pytest.raises(ValueError, match="must not be empty, got '' and 'x'"):
        ReasoningSplitter(False, "", "x")


def test_nothing_follows_the_final_push() -> None:
    splitter = ReasoningSplitter(True)
    splitter.push("", final=True)
    with pytest.raises(RuntimeError, match="final"):
        splitter.push("a")


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        ("<｜User｜>Hi<｜Assistant｜><think>\n", True),
        ("<｜User｜>Hi<｜Assistant｜><think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<｜Assistant｜></think>", False),
        ("<|im_start|>user\nWhat does <think> do?<|im_end|>\n<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_opens_reasoning(prompt: str, is_open: bool) -> None:
    assert opens_reasoning(prompt) == is_open


@pytest.mark.slow
@given(text=st.text("ab", max_size=12), markers=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_partial_len_is_the_longest_proper_beginning(text: str, markers: list[str]) -> None:
    lengths = [
        length
        for length in range(len(text) + 1)
        if any(len(marker) > length and marker.startswith(text[len(text) - length :]) for marker in markers)
    ]
    assert partial_len(text, markers) == max(lengths)
    found = find_first(text, markers)
    assert (found is None) == (not any(marker in text for marker in markers))
    if found is not None:
        assert text.startswith(found[1], found[0]) and not any(
            marker in text[: found[0] + len(marker) - 1] for marker in markers
        )
