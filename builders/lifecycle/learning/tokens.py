"""Lessons → token ids, and which of them are learnt: a whole text, of a chat what the assistant says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.learning.examples import Lesson

if TYPE_CHECKING:
    from deepseek_triton.ensemble.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenSequence:
    """ids: [num_tokens]. is_learnt: [num_tokens], whether a token's prediction counts; never the first."""

    ids: NDArray[np.int64]
    is_learnt: NDArray[np.bool_]


def tokenize(examples: Sequence[Lesson], tokenizer: Tokenizer, window_len: int, end_id: int) -> list[TokenSequence]:
    """The sequences of the examples, each cut at `window_len` tokens; those of which nothing is learnt are left out.

    end_id: a text's last token, which says that it ends.

    Raises:
        BuildError: a chat doesn't fit the model's template.
    """
    from deepseek_triton.ensemble.text.errors import TextError

    found = []
    for example in examples:
        try:
            one = _chat(example, tokenizer) if example.messages else _text(example, tokenizer, end_id)
        except TextError as error:
            raise BuildError(f"line {example.line}: {error}") from error
        one = TokenSequence(one.ids[:window_len], one.is_learnt[:window_len])
        if one.is_learnt.any():
            found.append(one)
    return found


def _text(example: Lesson, tokenizer: Tokenizer, end_id: int) -> TokenSequence:
    ids = np.append(np.asarray(tokenizer.encode(example.text), np.int64), end_id)
    is_learnt = np.ones(len(ids), bool)
    is_learnt[0] = False
    return TokenSequence(ids, is_learnt)


def _chat(example: Lesson, tokenizer: Tokenizer) -> TokenSequence:
    """The rendered chat; learnt are the tokens by which an assistant's turn makes it longer."""
    whole = _rendered(example.messages, tokenizer, opens=False)
    is_learnt = np.zeros(len(whole), bool)
    for index, (role, _) in enumerate(example.messages):
        if role == "assistant":
            before = _common(_rendered(example.messages[:index], tokenizer, opens=True), whole)
            after = _common(_rendered(example.messages[: index + 1], tokenizer, opens=False), whole)
            is_learnt[before:after] = True
    is_learnt[0] = False
    return TokenSequence(whole, is_learnt)


def _rendered(messages: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, opens: bool) -> NDArray[np.int64]:
    forms: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in messages]
    request = {"messages": forms, "add_generation_prompt": opens}
    return np.asarray(tokenizer.encode_messages(json.dumps(request)), np.int64)


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """The number of tokens with which both begin."""
    length = min(len(one), len(other))
    differing = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
