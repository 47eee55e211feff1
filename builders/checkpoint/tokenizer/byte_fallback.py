"""SentencePiece's byte-pair tokenizers (Llama 1 and 2, Mistral), made of their pieces and scores.

It knows neither GGUF nor sentencepiece's files, whose pieces it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE


class PieceType(IntEnum):
    """sentencepiece's types of pieces, which are GGUF's token types; any other is an ordinary piece too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


def byte_fallback_tokenizer(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    unknown: str | None = None,
    has_prefix: bool = True,
    prefixes_every_part: bool = True,
) -> Tokenizer:
    """The tokenizer of `pieces`, whose ids are their places.

    unknown: the piece for what no other piece and no byte can spell; None: the first of that type. has_prefix: a text
    gets a space before it. prefixes_every_part: so does each part of it that follows a special token.
    """
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if unknown is None and PieceType.UNKNOWN in types:
        unknown = pieces[list(types).index(PieceType.UNKNOWN)]
    merges = merges_of_scores(vocab, scores, types)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # The space that SentencePiece puts before a text goes in here and out again in Strip.
    if prefixes_every_part or not has_prefix:
        prepend = [normalizers.Prepend("▁")] if has_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    strip = [decoders.Strip(content=" ", left=1, right=0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def merges_of_scores(vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE: every way to make a piece of two, best score first.

    SentencePiece merges the neighbours whose joint piece scores highest; BPE merges the pair listed first.
    """
    ordinary = [piece for piece, index in vocab.items() if types[index] == PieceType.NORMAL]
    known = frozenset(ordinary)
    pairs = [
        (scores[vocab[piece]], piece[:cut], piece[cut:])
        for piece in ordinary
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    # Of pairs that make pieces of one score, the longer left part goes first, as in transformers' converter.
    pairs.sort(key=lambda pair: (-pair[0], -len(pair[1]), -len(pair[2])))
    return [(left, right) for _, left, right in pairs]
