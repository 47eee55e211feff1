"""Streamed text must be the whole text, whatever the ids and however they are pushed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders
from tokenizers.models import BPE

from ensemble.text import IncrementalDetokenizer, Tokenizer
from tests.real_tokenizers import HARD_TEXTS, deepseek, smollm2


def make(tokens: list[str], decoder: object, byte_fallback: bool = False) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        BPE(vocab=vocab, merges=[], unk_token=tokens[0], byte_fallback=byte_fallback, fuse_unk=True)
    )
    backend.decoder = decoder
    backend.add_special_tokens(["<s>"])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return Tokenizer(backend, bos_token="<s>")


BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁▁", "▁Hello", "▁a", "a", "é", "你", "\ufffd", "\n", "▁的", "H", "e", "l", "o", " "]


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: all 256 byte tokens, pieces with and without the space sign."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return make(["<unk>", "<s>", *BYTE_TOKENS, *PIECES], decoders.Sequence(parts), byte_fallback=True)


def metaspace() -> Tokenizer:
    """Its decoder strips the first token's space, not the first of the joined text."""
    return make(["<unk>", "<s>", *PIECES], decoders.Metaspace())


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "smollm2": smollm2,
    "deepseek": deepseek,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def stream(tokenizer: Tokenizer, pushes: list[list[int]]) -> Iterator[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    for number, ids in enumerate(pushes, 1):
        yield detokenizer.push(ids, final=number == len(pushes))


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """`ids` in len(cuts) + 1 pushes, some of them empty."""
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def awkward_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that are no text alone: single bytes and parts of characters, spaces, specials, ids out of range."""
    rng = random.Random(0)
    sample = rng.sample(range(tokenizer.vocab_size), min(5000, tokenizer.vocab_size))
    broken = [index for index in sample if "\ufffd" in tokenizer.decode([index])]
    high_bytes = [i for c in "你é😀ÿ\u200d\ufffd" for i in tokenizer._backend.encode(c).ids]
    first_ids = list(range(min(400, tokenizer.vocab_size)))  # specials and, in all four, the single bytes
    return [*broken, *high_bytes, *first_ids, tokenizer.vocab_size - 1, tokenizer.vocab_size + 7]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_ids_in_any_pushes(tokenizer: Tokenizer, data: st.DataObject) -> None:
    awkward = AWKWARD.setdefault(id(tokenizer), awkward_ids(tokenizer))
    token_ids = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from(awkward))
    ids = data.draw(st.lists(token_ids, max_size=24))
    cuts = data.draw(st.lists(st.integers(0, 24), max_size=24))
    texts = list(stream(tokenizer, split(ids, cuts)))
    assert "".join(texts) == tokenizer.decode(ids)


AWKWARD: dict[int, list[int]] = {}


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=24), cuts=st.lists(st.integers(0, 24), max_size=24))
def test_any_bytes_one_token_each(tokenizer: Tokenizer, raw: bytes, cuts: list[int]) -> None:
    """Bytes that are no UTF-8 too: each is one token where the vocabulary has bytes."""
    ids = [index for byte in raw if (index := byte_id(tokenizer, byte)) is not None]
    assert "".join(stream(tokenizer, split(ids, cuts))) == tokenizer.decode(ids)


def byte_id(tokenizer: Tokenizer, byte: int) -> int | None:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    shown = chr(byte) if byte in printable else chr(256 + others.index(byte))
    for name in (f"<0x{byte:02X}>", shown):
        index: int | None = tokenizer._backend.token_to_id(name)
        if index is not None:
            return index
    return None


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("load", [smollm2, deepseek])
def test_hard_texts_token_by_token(load: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = load()
    ids = tokenizer.encode(text).tolist()
    texts = list(stream(tokenizer, [[index] for index in ids]))
    assert "".join(texts) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in texts)


def test_half_a_character_is_held_back_and_flushed(tokenizer: Tokenizer) -> None:
    ids = [byte_id(tokenizer, byte) for byte in "你".encode()]
    if None in ids:
        pytest.skip("no byte tokens in this vocabulary")
    first, second, third = (index for index in ids if index is not None)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([first]), detokenizer.push([second])] == ["", ""]
    assert detokenizer.push([third], final=True) == "你"
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([first, second]) == ""
    assert detokenizer.push([], final=True) == tokenizer.decode([first, second])
    assert "\ufffd" in tokenizer.decode([first, second])


def test_text_is_given_out_at_once() -> None:
    """Holding everything back until the end would satisfy the equalities above, and nobody else."""
    tokenizer = smollm2()
    ids = tokenizer.encode("The capital of France is Paris.").tolist()
    assert list(stream(tokenizer, [[i] for i in ids])) == [tokenizer.decode([i]) for i in ids]
    tokenizer = sentencepiece()
    ids = [tokenizer._backend.token_to_id(t) for t in ("▁Hello", "▁", "▁a", "<0x0A>", "<s>", "<0x0A>", "a", "▁的")]
    assert list(stream(tokenizer, [[i] for i in ids])) == ["Hello", " ", " a", "", "", "", "\n\na", " 的"]


def test_a_run_of_bytes_does_not_hold_back_the_text_before_it() -> None:
    tokenizer = sentencepiece()
    hello, byte = (tokenizer._backend.token_to_id(token) for token in ("▁Hello", "<0xE4>"))
    assert IncrementalDetokenizer(tokenizer).push([hello, byte]) == "Hello"


@pytest.mark.parametrize("byte", [0x41, 0xFF, 0xE4])
def test_cost_of_a_token_does_not_grow(
    tokenizer: Tokenizer, byte: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endless invalid bytes are the worst case: no text boundary ever comes."""
    index = byte_id(tokenizer, byte)
    if index is None:
        pytest.skip("no byte tokens in this vocabulary")
    num_decoded = 0
    decode = tokenizer.decode

    def counted(ids: list[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(ids)
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", counted)
    texts = list(stream(tokenizer, [[index]] * 500))
    assert num_decoded <= 500 * 10
    assert "".join(texts) == decode([index] * 500)


def test_nothing_follows_the_final_push() -> None:
    detokenizer = IncrementalDetokenizer(sentencepiece())
    assert detokenizer.push([], final=True) == ""
    with pytest.raises(RuntimeError, match="final"):
        detokenizer.push([1])
