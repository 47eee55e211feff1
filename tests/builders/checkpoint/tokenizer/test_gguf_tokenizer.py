"""The table of pre-tokenizers against real tokenizers, and SentencePiece's merges against its own rule."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from tokenizers.models import BPE

from deepseek_triton.builders.checkpoint.tokenizer.byte_fallback import merges_of_scores
from deepseek_triton.builders.checkpoint.tokenizer.gguf_tokenizer import (
    BYTE_PAIR_RULES,
    GGUFTokenizerError,
    write_tokenizer,
)
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.real_tokenizers import HARD_TEXTS, deepseek_directory, smollm2, smollm2_directory


class FakeField:
    def __init__(self, value: Any) -> None:
        self.value = value

    def contents(self) -> Any:
        return self.value


class FakeReader:
    """A GGUF's metadata without the GGUF; `fields` holds whole keys, the arguments those of the tokenizer."""

    def __init__(self, chat_template: str | None = None, **ggml: Any) -> None:
        values = {f"tokenizer.ggml.{key}": value for key, value in ggml.items() if value is not None}
        if chat_template is not None:
            values["tokenizer.chat_template"] = chat_template
        self.fields = {key: FakeField(value) for key, value in values.items()}


TINY_BPE: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["<s>", "</s>", "a", "b", "ab", "Ġ", "<tool>"],
    "token_type": [3, 3, 1, 1, 1, 1, 4],
    "merges": ["a b"],
    "bos_token_id": 0,
    "eos_token_id": 1,
}
PIECES = ["▁", "h", "e", "l", "o", "he", "ll", "llo", "▁he", "hello", "▁hello", "▁h"]
TINY_SENTENCEPIECE: dict[str, Any] = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES],
    "token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
    "scores": [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))],
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def written(directory: Path, metadata: dict[str, Any], **changes: Any) -> Tokenizer:
    write_tokenizer(FakeReader(**{**metadata, **changes}), directory)
    return Tokenizer.from_directory(directory)


# --- byte-level BPE


@pytest.mark.slow
def test_deepseek_rebuilt_from_gguf_metadata_gives_its_own_ids(tmp_path: Path) -> None:
    source = deepseek_directory() / "tokenizer.json"
    spec = json.loads(source.read_text(encoding="utf-8"))
    added = {token["id"]: token for token in spec["added_tokens"]}
    tokens = {
        **{i: token for token, i in spec["model"]["vocab"].items()},
        **{i: t["content"] for i, t in added.items()},
    }
    ours = written(
        tmp_path,
        {
            "model": "gpt2",
            "pre": "deepseek-v3",
            "tokens": [tokens[i] for i in range(len(tokens))],
            "token_type": [1 if i not in added else 3 if added[i]["special"] else 4 for i in range(len(tokens))],
            "merges": [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]],
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    )
    theirs = Backend.from_file(str(source))
    for text in HARD_TEXTS:
        assert ours.encode(text).tolist() == theirs.encode(text).ids, text
    assert ours.decode(range(len(tokens))) == theirs.decode(list(range(len(tokens))))


# What SmolLM2's own tokenizer.json gives. llama.cpp records a hash of its ids of one long text (`smollm` in
# convert_hf_to_gguf.py); the tokenizer that gave that hash gave these.
SMOLLM2_IDS = {
    "Hello, world!": [19556, 28, 905, 17],
    "In 2026, 1234½ things cost $3.50.": [
        *(788, 216, 34, 32, 34, 38, 28, 216, 33, 34, 35, 36, 16738, 1495, 1708, 1885, 35, 30, 37, 32, 30)
    ],
    "中文 हिन्दी": [28589, 29184, 12335, 134, 27011, 30658, 16525, 44757, 37189],
    "def f(x):\n\t\treturn x  # ok\n\n\n": [*(1604, 275, 24, 104, 727, 3354, 197, 5406, 1792, 216, 907, 10907, 16506)],
    "<|im_start|>user\nI've we'RE<|im_end|>": [1, 4093, 198, 57, 3543, 392, 23, 3256, 2],
}


@pytest.mark.parametrize("text", SMOLLM2_IDS)
def test_smollm2_ids(text: str) -> None:
    assert smollm2().encode(text).tolist() == SMOLLM2_IDS[text]


def test_smollm2_files() -> None:
    tokenizer = smollm2()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.vocab_size) == (
        "<|im_start|>",
        "<|im_end|>",
        49152,
    )
    config = json.loads((smollm2_directory() / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (config["add_bos_token"], config["add_eos_token"], config["pad_token"]) == (
        False,
        False,
        "<|im_end|>",
    )
    assert (smollm2_directory() / "chat_template.jinja").read_text(encoding="utf-8").startswith("{% for message")


SAMPLE = "I'VE 1234 a_b é中文!?\n\n  y"
PIECES_OF_SAMPLE = {
    "gpt-2": "I|'|VE| 1234| a|_|b| é中文|!?|\n\n | y",
    "default": "I|'|VE| |123|4| a|_|b| é中文|!?|\n\n | y",
    "smollm": "I|'|VE| |1|2|3|4| a|_|b| é中文|!?|\n\n | y",
    "deepseek-llm": "I|'|VE| |1|2|3|4| a|_|b| é|中文|!?|\n|\n| | y",
    "deepseek-coder": "I|'|VE| |1|2|3|4| a|_|b| é|中文|!?|\n|\n| | y",
    "deepseek-v3": "I|'VE| |123|4| a|_b| é|中文|!?\n\n| | y",
    "qwen2": "I|'VE| |1|2|3|4| a|_b| é中文|!?\n\n| | y",
    "deepseek-r1-qwen": "I|'VE| |1|2|3|4| a|_b| é中文|!?\n\n| | y",
    "llama-bpe": "I|'VE| |123|4| a|_b| é中文|!?\n\n| | y",
    "llama3": "I|'VE| |123|4| a|_b| é中文|!?\n\n| | y",
    "llama-v3": "I|'VE| |123|4| a|_b| é中文|!?\n\n| | y",
}


@pytest.mark.parametrize("pre", BYTE_PAIR_RULES)
def test_each_pre_tokenizer_cuts_as_its_model_does(pre: str) -> None:
    splits = pre_tokenizers.Sequence(list(BYTE_PAIR_RULES[pre].splits)).pre_tokenize_str(SAMPLE)
    assert "|".join(SAMPLE[start:end] for _, (start, end) in splits) == PIECES_OF_SAMPLE[pre]


def test_deepseek_llm_joins_its_own_letters_only() -> None:
    splits = pre_tokenizers.Sequence(list(BYTE_PAIR_RULES["deepseek-llm"].splits))
    assert [span for _, span in splits.pre_tokenize_str("µßΩЖ\U0001e943")] == [(0, 5)]
    assert [span for _, span in splits.pre_tokenize_str("µ\u0294ß")] == [(0, 1), (1, 2), (2, 3)]


def test_tokens_by_their_types(tmp_path: Path) -> None:
    tokenizer = written(tmp_path, TINY_BPE)
    assert tokenizer.encode("ab<tool>a</s>").tolist() == [4, 6, 2, 1]
    assert tokenizer.decode([0, 4, 6, 5, 2, 1]) == "ab<tool> a"


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({}, [4]),
        ({"add_bos_token": True}, [0, 4]),
        ({"add_bos_token": True, "add_eos_token": True}, [0, 4, 1]),
        ({"pre": "llama-bpe"}, [0, 4]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [4]),
    ],
)
def test_bos_and_eos(tmp_path: Path, changes: dict[str, Any], ids: list[int]) -> None:
    assert written(tmp_path, TINY_BPE, **changes).encode("ab").tolist() == ids


def test_llama3_takes_whole_tokens_before_merges(tmp_path: Path) -> None:
    tokens = {**TINY_BPE, "tokens": [*TINY_BPE["tokens"], "aba"], "token_type": [*TINY_BPE["token_type"], 1]}
    assert written(tmp_path, tokens, pre="llama-bpe", add_bos_token=False).encode("aba").tolist() == [7]
    assert written(tmp_path, tokens, pre="qwen2").encode("aba").tolist() == [4, 2]


# --- SentencePiece


def test_sentencepiece_round_trip(tmp_path: Path) -> None:
    tokenizer = written(tmp_path, TINY_SENTENCEPIECE)
    ids = tokenizer.encode("hello  hello é\n你").tolist()
    tokens = TINY_SENTENCEPIECE["tokens"]
    assert [tokens[i] for i in ids[:4]] == ["<s>", "▁hello", "▁", "▁hello"]
    assert [tokens[i] for i in ids[4:]] == [*("▁", "<0xC3>", "<0xA9>", "<0x0A>", "<0xE4>", "<0xBD>", "<0xA0>")]
    assert tokenizer.decode(ids) == "hello  hello é\n你"
    bare = written(tmp_path / "bare", TINY_SENTENCEPIECE, add_space_prefix=False, add_bos_token=False)
    assert [tokens[i] for i in bare.encode("hello")] == ["hello"]
    assert bare.decode(bare.encode(" hello")) == " hello"


def by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's rule, slowly: of all neighbours, join those whose joint piece scores highest."""
    parts = list(text)
    while True:
        joint = [left + right for left, right in pairwise(parts)]
        best = max((piece for piece in joint if piece in scores), key=lambda piece: scores[piece], default=None)
        if best is None:
            return parts
        at = joint.index(best)
        parts[at : at + 2] = [best]


@pytest.mark.slow
@settings(max_examples=100)
@given(
    joins=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=25),
    rng=st.randoms(use_true_random=False),
    text=st.text("abcd", min_size=1, max_size=20),
)
def test_merges_follow_the_scores(joins: list[tuple[int, int]], rng: Random, text: str) -> None:
    pieces = list("abcd")
    for left, right in joins:
        piece = pieces[left % len(pieces)] + pieces[right % len(pieces)]
        # Where a piece can be made in two ways, transformers' order of merges and SentencePiece may part.
        if sum(piece[:cut] in pieces and piece[cut:] in pieces for cut in range(1, len(piece))) == 1:
            pieces.append(piece)
    pieces = [
        piece
        for piece in dict.fromkeys(pieces)
        if sum(piece[:cut] in pieces and piece[cut:] in pieces for cut in range(1, len(piece))) <= 1
    ]
    scores = [float(score) for score in rng.sample(range(100), len(pieces))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = merges_of_scores(vocab, scores, [1] * len(pieces))
    tokens = Backend(BPE(vocab=vocab, merges=merges)).encode(text).tokens
    assert tokens == by_scores(text, dict(zip(pieces, scores, strict=True)))


def test_only_ordinary_pieces_are_merged() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "ba": 3}
    assert merges_of_scores(vocab, [0.0, 0.0, -1.0, -2.0], [1, 1, 1, 3]) == [("a", "b")]


# --- What is refused


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        (TINY_BPE, {"model": None}, "tokenizer.ggml.model is missing"),
        (TINY_BPE, {"model": "bert"}, "tokenizer.ggml.model is 'bert': known are gpt2, llama"),
        (TINY_BPE, {"pre": None}, "tokenizer.ggml.pre is missing"),
        (TINY_BPE, {"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken': known are .*deepseek-v3"),
        (TINY_BPE, {"tokens": None}, "tokenizer.ggml.tokens is missing"),
        (TINY_BPE, {"tokens": "a"}, "tokenizer.ggml.tokens must be a list"),
        (TINY_BPE, {"tokens": ["a", "a"]}, "tokenizer.ggml.tokens holds 'a' twice"),
        (TINY_BPE, {"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries for 7 tokens"),
        (TINY_BPE, {"merges": None}, "tokenizer.ggml.merges is missing"),
        (TINY_BPE, {"merges": ["a z"]}, "tokens and merges make no tokenizer"),
        (TINY_BPE, {"merges": ["ab"]}, "tokens and merges make no tokenizer"),
        (TINY_BPE, {"eos_token_id": None}, "tokenizer.ggml.eos_token_id is missing"),
        (TINY_BPE, {"eos_token_id": 7}, "tokenizer.ggml.eos_token_id is 7, outside of 7 tokens"),
        (TINY_BPE, {"bos_token_id": None, "add_bos_token": True}, "tokenizer.ggml.bos_token_id is missing"),
        (TINY_SENTENCEPIECE, {"scores": None}, "tokenizer.ggml.scores is missing"),
        (TINY_SENTENCEPIECE, {"scores": [0.0]}, "tokenizer.ggml.scores has 1 entries"),
    ],
)
def test_refused(tmp_path: Path, metadata: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GGUFTokenizerError, match=message):
        written(tmp_path, metadata, **changes)


def test_named_templates_and_special_tokens_are_written(tmp_path: Path) -> None:
    reader = FakeReader("PLAIN {{ messages[0].content }}{{ unk_token }}{{ sep_token }}", **TINY_BPE,
                        unknown_token_id=2, seperator_token_id=1)  # fmt: skip
    reader.fields["tokenizer.chat_template.tool_use"] = FakeField(
        "TOOLS {{ tools | length }} {{ messages[0].content }}"
    )
    reader.fields["tokenizer.chat_templates"] = FakeField(["tool_use"])
    write_tokenizer(reader, tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    messages = [{"role": "user", "content": "ab"}]
    assert tokenizer.chat_prompt(json.dumps(messages)).text == "PLAIN aba</s>"
    assert tokenizer.chat_prompt(json.dumps({"messages": messages, "tools": [{}]})).text == "TOOLS 1 ab"
    reader.fields["tokenizer.chat_template.../x"] = FakeField("x")
    with pytest.raises(GGUFTokenizerError, match="names a chat template"):
        write_tokenizer(reader, tmp_path)
    for key in ("tokenizer.chat_template", "tokenizer.chat_template.other"):
        reader = FakeReader(**TINY_BPE)
        reader.fields[key] = FakeField(3)
        with pytest.raises(GGUFTokenizerError, match=f"{key} must be a text, got 3"):
            write_tokenizer(reader, tmp_path)


def test_an_end_of_turn_alone_ends_a_text_too(tmp_path: Path) -> None:
    write_tokenizer(FakeReader(**{**TINY_BPE, "eos_token_id": None, "eot_token_id": 1}), tmp_path)
    assert Tokenizer.from_directory(tmp_path).eos_id is None
