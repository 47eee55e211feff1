"""No bad word in the text, however a sampler tries; every other token stays possible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_triton.ensemble.sampling import Sampler, SamplingError, SamplingParams, choose
from deepseek_triton.ensemble.text.bad_words import BadWords
from deepseek_triton.ensemble.text.errors import TextError
from tests.ensemble.models.test_detokenizer import TOKENIZERS, segments, sentencepiece, token_ids
from tests.support.real_tokenizers import deepseek, smollm2


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_token_is_allowed_unless_the_text_would_hold_a_bad_word(name: str) -> None:
    tokenizer = TOKENIZERS[name]()

    @settings(max_examples=250)
    @given(
        ids=st.lists(segments(tokenizer), max_size=12).map(lambda lists: [i for ids in lists for i in ids]),
        span=st.tuples(st.integers(0, 40), st.integers(1, 5)),
        words=st.lists(st.sampled_from(["a", "é你", "H", "\n", "zz"]), max_size=2),
    )
    def check(ids: list[int], span: tuple[int, int], words: list[str]) -> None:
        text = tokenizer.decode(ids)
        part = text[span[0] % (len(text) + 1) :][: span[1]]
        words = words + ([part] if part and "\ufffd" not in part else [])
        rule = BadWords(tokenizer, words)
        taken: list[int] = []
        for token in ids:
            would_be = tokenizer.decode([*taken, token])
            assert rule.is_allowed(token) == (not any(word in would_be for word in words))
            if rule.is_allowed(token):
                rule.push(token)
                taken.append(token)

    check()


def test_a_bad_word_across_tokens_in_every_split() -> None:
    tokenizer = smollm2()
    for split in (["b", "ad"], ["ba", "d"], ["b", "a", "d"], [" b", "ad"], ["xb", "ad"]):
        *first, last = [tokenizer.encode(part).tolist() for part in split]
        rule = BadWords(tokenizer, ["bad"])
        for token in [index for ids in first for index in ids]:
            assert rule.is_allowed(token)
            rule.push(token)
        assert not rule.is_allowed(last[0])
        assert rule.is_allowed(tokenizer.encode("x").tolist()[0])


def test_a_word_that_was_forced_in_does_not_forbid_all_that_follows() -> None:
    tokenizer = smollm2()
    rule = BadWords(tokenizer, ["bad"])
    for token in tokenizer.encode("so bad").tolist():
        rule.push(token)
    assert rule.is_allowed(tokenizer.encode(" x").tolist()[0])
    assert not rule.is_allowed(tokenizer.encode(" bad").tolist()[0])


def test_bad_words_that_cannot_be_looked_for() -> None:
    with pytest.raises(TextError, match=r"bad_words\[0\] is empty"):
        BadWords(smollm2(), [""])


@pytest.mark.parametrize("params", [{}, {"temperature": 1.5, "seed": 3}, {"top_p": 0.9, "seed": 4}])
def test_the_sampler_writes_around_a_bad_word(params: dict[str, float]) -> None:
    """The likeliest text is a sentence with the bad word; the second likeliest token differs in each place."""
    tokenizer = deepseek()
    ids = tokenizer.encode("The capital of France is Paris, and Paris is in France.").tolist()
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(len(ids), tokenizer.vocab_size)).astype(np.float32)
    rows[np.arange(len(ids)), ids] += 30
    cases: tuple[tuple[list[str], int], ...] = (([], 0), (["Paris"], 2), ([" in Fr", "capital", "e is P"], 3))
    for words, num_changed in cases:
        sampler, rule = Sampler(SamplingParams(**params)), BadWords(tokenizer, words)  # type: ignore[arg-type]
        taken = [choose(sampler, rule, row).token for row in rows]
        text = tokenizer.decode(taken)
        assert not any(word in text for word in words)
        changed = [index for index, (a, b) in enumerate(zip(taken, ids, strict=True)) if a != b]
        assert len(changed) == num_changed, "only the tokens that complete a bad word"


def test_an_end_token_is_no_text_and_ends_even_a_sequence_that_may_say_nothing() -> None:
    tokenizer = sentencepiece()
    (a,) = token_ids(tokenizer, "a")
    logits = np.full(tokenizer.vocab_size, -np.inf, np.float32)
    logits[a] = 1.0
    with pytest.raises(SamplingError, match="no token is allowed here"):
        choose(Sampler(SamplingParams()), BadWords(tokenizer, ["a"]), logits)
    sampler = Sampler(SamplingParams(), end_ids=frozenset({a}))
    rule = BadWords(tokenizer, ["a"])
    assert choose(sampler, rule, logits).token == a
    assert rule.is_allowed(token_ids(tokenizer, "l")[0])
