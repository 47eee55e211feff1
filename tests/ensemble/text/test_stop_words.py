"""A client gets exactly the text before the stop word: never more, and all of it in the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_triton.ensemble.text.errors import TextError
from deepseek_triton.ensemble.text.stop_words import StopMatcher
from deepseek_triton.ensemble.text.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.ensemble.models.test_detokenizer import TOKENIZERS, byte_ids, segments, sentencepiece, token_ids
from tests.ensemble.text.test_word_finder import first_place, longest_beginning
from tests.support.real_tokenizers import HARD_TEXTS, smollm2


def stopped_text(tokenizer: Tokenizer, ids: list[int], words: list[str]) -> tuple[str, int]:
    """By the definition: the text to show, and after how many tokens it was found."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if (place := first_place(text, words)) is not None:
            return text[:place], count
    return tokenizer.decode(ids), len(ids)


def client(tokenizer: Tokenizer, ids: list[int], words: list[str], lags: list[int]) -> Iterator[str]:
    """The pieces that a client gets: after each token the engine sends what is safe, less the lag of that moment."""
    matcher, detokenizer, num_sent = StopMatcher(tokenizer, words), IncrementalDetokenizer(tokenizer), 0
    num_cut = 0
    for count, (token, lag) in enumerate(zip(ids, itertools.cycle(lags or [0])), 1):
        state = matcher.push(token)
        assert num_sent <= state.num_safe_tokens <= count
        if state.is_stop:
            ids, num_cut = ids[:count], state.num_cut_chars
            break
        num_ready = max(num_sent, state.num_safe_tokens - lag)
        yield detokenizer.push(ids[num_sent:num_ready])
        num_sent = num_ready
    last = detokenizer.push(ids[num_sent:], final=True)
    assert num_cut <= len(last)
    yield last[: len(last) - num_cut]


def words_of(tokenizer: Tokenizer, ids: list[int], spans: list[tuple[int, int]], others: list[str]) -> list[str]:
    """Words that do occur, or nearly: parts of the text, some with a changed end, and `others`."""
    text = tokenizer.decode(ids)
    parts = [text[start % (len(text) + 1) :][:length] for start, length in spans]
    words = parts + [part[:-1] + "#" for part in parts[::2] if part] + others
    return [word for word in words if word and "\ufffd" not in word]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_ids_any_words_any_release(name: str) -> None:
    tokenizer = TOKENIZERS[name]()

    @settings(max_examples=250)
    @given(
        ids=st.lists(segments(tokenizer), max_size=10).map(lambda lists: [i for ids in lists for i in ids]),
        spans=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=4),
        others=st.lists(st.sampled_from(["a", " ", "\n", "aa", "é你", "zzz"]), max_size=2),
        lags=st.lists(st.integers(0, 5), max_size=4),
    )
    def check(ids: list[int], spans: list[tuple[int, int]], others: list[str], lags: list[int]) -> None:
        words = words_of(tokenizer, ids, spans, others)
        expected, _ = stopped_text(tokenizer, ids, words)
        sent = ""
        for piece in client(tokenizer, ids, words, lags):
            sent += piece
            assert expected.startswith(sent), "part of a stop word leaked"
        assert sent == expected

    check()


@pytest.mark.slow
@settings(max_examples=300)
@given(
    text=st.sampled_from(HARD_TEXTS),
    spans=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 12)), min_size=1, max_size=4),
    name=st.sampled_from(["smollm2", "deepseek"]),
)
def test_hard_texts(text: str, spans: list[tuple[int, int]], name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(text).tolist()
    words = words_of(tokenizer, ids, spans, [])
    assert "".join(client(tokenizer, ids, words, [0])) == stopped_text(tokenizer, ids, words)[0]


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data(), words=st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=3))
def test_no_token_is_held_back_without_need(data: st.DataObject, words: list[str]) -> None:
    """Holding everything back until the end would satisfy all of the above."""
    tokenizer = smollm2()
    vocabulary = tokenizer.encode(" a b ab ba aab c\n").tolist()
    ids = data.draw(st.lists(st.sampled_from(vocabulary), max_size=20))
    matcher, text = StopMatcher(tokenizer, words), ""
    for count, token in enumerate(ids, 1):
        state = matcher.push(token)
        text = tokenizer.decode(ids[:count])
        if state.is_stop:
            return
        safe_len = len(text) - longest_beginning(text, words)
        num_safe = max(n for n in range(count + 1) if len(tokenizer.decode(ids[:n])) <= safe_len)
        assert state.num_safe_tokens == num_safe


def test_a_stop_word_that_begins_and_ends_inside_of_tokens() -> None:
    tokenizer = smollm2()
    ids = tokenizer.encode("The capital of France is Paris.").tolist()
    matcher = StopMatcher(tokenizer, ["tal of Fra"])
    states = [matcher.push(index) for index in ids[:4]]
    assert [tokenizer.decode([index]) for index in ids[:4]] == ["The", " capital", " of", " France"]
    assert [(state.num_safe_tokens, state.is_stop) for state in states] == [
        (1, False),
        (1, False),
        (1, False),
        (1, True),
    ]
    assert states[-1].num_cut_chars == len("tal of France")


def test_tokens_that_turn_out_harmless_are_let_go() -> None:
    tokenizer = smollm2()
    matcher = StopMatcher(tokenizer, ["capital of Spain"])
    ids = tokenizer.encode("The capital of France is").tolist()
    assert [matcher.push(index).num_safe_tokens for index in ids] == [1, 1, 1, 4, 5]


def test_a_stop_word_of_byte_tokens_is_found_at_once() -> None:
    """SentencePiece writes a line break as a byte, whose text a detokenizer gives only after the next token."""
    tokenizer = sentencepiece()
    hello, newline = token_ids(tokenizer, "▁Hello", "<0x0A>")
    matcher = StopMatcher(tokenizer, ["\n\n"])
    assert not matcher.push(hello).is_stop and not matcher.push(newline).is_stop
    state = matcher.push(newline)
    assert (state.is_stop, state.num_cut_chars) == (True, 2)
    assert IncrementalDetokenizer(tokenizer).push([hello, newline, newline], final=True)[:-2] == "Hello"


def test_half_a_character_behind_a_stop_word_is_cut_too() -> None:
    tokenizer = smollm2()
    ids = [*tokenizer.encode("stop").tolist(), *byte_ids(tokenizer, "你".encode())[:1]]
    assert "".join(client(tokenizer, ids, ["stop"], [0])) == ""
    # The very token that completes the word may bring the half.
    ids = tokenizer.encode("a b c").tolist() + ids[-1:]
    assert "".join(client(tokenizer, ids, ["zzz"], [0])) == "a b c\ufffd"


def test_nothing_follows_a_stop() -> None:
    matcher = StopMatcher(smollm2(), ["a"])
    (token,) = smollm2().encode("a").tolist()
    assert matcher.push(token).is_stop
    with pytest.raises(RuntimeError, match="after a stop"):
        matcher.push(token)


def test_without_stop_words_every_token_is_safe_at_once() -> None:
    matcher = StopMatcher(smollm2(), [])
    assert [matcher.push(token).num_safe_tokens for token in (5, 6, 7)] == [1, 2, 3]


def test_bad_stop_words() -> None:
    with pytest.raises(TextError, match=r"stop_words\[1\] is empty"):
        StopMatcher(smollm2(), ["a", ""])


@pytest.mark.parametrize("name", ["smollm2", "deepseek"])
def test_cost_of_a_token_does_not_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS[name]()
    (byte,) = byte_ids(tokenizer, b"\x98")
    num_decoded, decode = 0, tokenizer.decode

    def counted(ids: list[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    matcher = StopMatcher(tokenizer, ["zzz"])
    for _ in range(500):
        matcher.push(byte)
    assert num_decoded <= 500 * 10
