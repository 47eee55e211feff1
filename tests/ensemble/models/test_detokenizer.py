"""Streamed text must be the whole text, whatever the ids and however they are pushed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders
from tokenizers.models import BPE

from deepseek_triton.ensemble.text.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.support.real_tokenizers import HARD_TEXTS, deepseek, smollm2, smollm2_directory


def make(tokens: list[str], decoder: Any, byte_fallback: bool = False) -> Tokenizer:
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


@functools.cache
def smollm2_shown() -> Tokenizer:
    """A special token among the text, as a marker of tool calls is in some converted checkpoints."""
    backend = tokenizers.Tokenizer.from_file(str(smollm2_directory() / "tokenizer.json"))
    return Tokenizer(backend, bos_token="<|im_start|>", shown=frozenset(["<|im_start|>"]))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "smollm2": smollm2,
    "smollm2_shown": smollm2_shown,
    "deepseek": deepseek,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
}


WITH_BYTES = ["smollm2", "smollm2_shown", "deepseek", "sentencepiece"]


def stream(tokenizer: Tokenizer, pushes: list[list[int]]) -> Iterator[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    for number, ids in enumerate(pushes, 1):
        yield detokenizer.push(ids, final=number == len(pushes))


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """`ids` in len(cuts) + 1 pushes, some of them empty."""
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in itertools.pairwise(edges)]


def byte_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    """The token of each single byte; none where the vocabulary has no bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in raw]
    names = [[f"<0x{byte:02X}>", name] for byte, name in zip(raw, shown, strict=True)]
    found = [[tokenizer._backend.token_to_id(name) for name in pair] for pair in names]
    return [next(i for i in pair if i is not None) for pair in found if any(i is not None for i in pair)]


def token_ids(tokenizer: Tokenizer, *names: str) -> list[int]:
    ids = [tokenizer._backend.token_to_id(name) for name in names]
    assert None not in ids
    return [index for index in ids if index is not None]


def segments(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids that meet in the ways that hurt: bytes of characters, bytes of none, runs of specials."""

    def to_ids(raw: bytes) -> list[int]:
        return byte_ids(tokenizer, raw)

    special = tokenizer.bos_id
    unknown = tokenizer.vocab_size + 7
    return st.one_of(
        st.integers(0, tokenizer.vocab_size - 1).map(lambda index: [index]),
        st.sampled_from("a é你😀\ufffd\u200d").map(lambda character: to_ids(character.encode())),
        st.binary(min_size=1, max_size=5).map(to_ids),
        st.sampled_from([b"\xe4", b"\xf0\x9f", b"\x98", b"\xff", b" "]).map(to_ids),
        st.tuples(st.sampled_from([special, unknown]), st.integers(1, 6)).map(lambda pair: [pair[0]] * pair[1]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_ids_in_any_pushes(name: str) -> None:
    tokenizer = TOKENIZERS[name]()

    @settings(max_examples=200)
    @given(
        ids=st.lists(segments(tokenizer), max_size=10).map(lambda lists: [i for ids in lists for i in ids]),
        cuts=st.one_of(st.just(list(range(99))), st.lists(st.integers(0, 24), max_size=12)),
    )
    def check(ids: list[int], cuts: list[int]) -> None:
        assert "".join(stream(tokenizer, split(ids, cuts))) == tokenizer.decode(ids)

    check()


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("load", [smollm2, deepseek])
def test_hard_texts_token_by_token(load: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = load()
    ids = tokenizer.encode(text).tolist()
    texts = list(stream(tokenizer, [[index] for index in ids]))
    assert "".join(texts) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in texts)


@pytest.mark.parametrize("name", WITH_BYTES)
def test_half_a_character_is_held_back_and_flushed(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    first, second, third = byte_ids(tokenizer, "你".encode())
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([first]), detokenizer.push([second])] == ["", ""]
    assert detokenizer.push([third], final=True) == "你"
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([first, second]) == ""
    assert detokenizer.push([], final=True) == tokenizer.decode([first, second])
    assert "\ufffd" in tokenizer.decode([first, second])


def test_text_is_given_out_at_once() -> None:
    """Text must be released early: a parser that holds back everything would pass the tests above."""
    tokenizer = smollm2()
    ids = tokenizer.encode("The capital of France is Paris.").tolist()
    assert list(stream(tokenizer, [[i] for i in ids])) == [tokenizer.decode([i]) for i in ids]
    tokenizer = sentencepiece()
    ids = [tokenizer._backend.token_to_id(t) for t in ("▁Hello", "▁", "▁a", "<0x0A>", "<s>", "<0x0A>", "a", "▁的")]
    assert list(stream(tokenizer, [[i] for i in ids])) == ["Hello", " ", " a", "", "", "", "\n\na", " 的"]


def test_shown_special_tokens_are_text() -> None:
    tokenizer = smollm2_shown()
    ids = token_ids(tokenizer, "<|im_start|>", "Hi", "<|im_end|>", "<|im_start|>", "Ġyou")
    assert tokenizer.decode(ids) == "<|im_start|>Hi<|im_start|> you"
    assert list(stream(tokenizer, [[i] for i in ids])) == ["<|im_start|>", "Hi", "", "<|im_start|>", " you"]
    assert smollm2().decode(ids) == "Hi you"


def test_a_run_of_bytes_does_not_hold_back_the_text_before_it() -> None:
    tokenizer = sentencepiece()
    hello, byte = token_ids(tokenizer, "▁Hello", "<0xE4>")
    assert IncrementalDetokenizer(tokenizer).push([hello, byte]) == "Hello"


@pytest.mark.parametrize("byte", [0x41, 0x98, 0xE4])
@pytest.mark.parametrize("name", WITH_BYTES)
def test_cost_of_a_token_does_not_grow(name: str, byte: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endless invalid bytes are the worst case: no text boundary ever comes."""
    tokenizer = TOKENIZERS[name]()
    (index,) = byte_ids(tokenizer, bytes([byte]))
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
