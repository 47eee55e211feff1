"""Converts tokenizer.json to an llguidance tokenizer, and determines the tokens that no guide may allow.

It knows token ids and their bytes; it knows nothing of guides.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.guided.errors import GuideError
from deepseek_triton.ensemble.text.errors import one_line

if TYPE_CHECKING:
    import llguidance

Mask = NDArray[np.uint32]  # bit i of word j says whether token 32 j + i is allowed

MAX_LEXER_STATES = 50_000  # per guide, 1 to 2 kB each


class Vocabulary:
    """One model's tokens, as guided decoding sees them.

    Args:
        tokenizer: llguidance's, with the model's vocabulary size and end tokens.
        not_text: ids that are never allowed, unless they end a sequence.
        end_ids: tokens that end a sequence.
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, not_text: Collection[int], end_ids: Collection[int]) -> None:
        import llguidance

        self._tokenizer = tokenizer
        self._limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        self.end_ids = frozenset(end_ids)
        self.num_words = -(-tokenizer.vocab_size // 32)
        ids = np.arange(self.num_words * 32)
        is_end = np.isin(ids, list(end_ids))
        is_text = ~np.isin(ids, list(not_text)) & (ids < tokenizer.vocab_size)
        self.end_mask: Mask = np.packbits(is_end, bitorder="little").view(np.uint32)
        self.allowed_mask: Mask = np.packbits(is_text | is_end, bitorder="little").view(np.uint32)

    @classmethod
    def read(cls, path: Path, vocab_size: int, end_ids: Collection[int]) -> Vocabulary:
        """Read tokenizer.json at `path`.

        Raises:
            GuideError: the file is damaged, or doesn't fit `vocab_size` or `end_ids`.
        """
        import llguidance

        if not end_ids or min(end_ids) < 0 or max(end_ids) >= vocab_size:
            raise GuideError(f"end_ids are {sorted(end_ids)}, must be at least one, each in 0 … {vocab_size - 1}")
        try:
            source = json.loads(path.read_text(encoding="utf-8"))
            # A pad token that a training added may lie beyond the model's rows: no guide can choose it.
            source["added_tokens"] = [token for token in source.get("added_tokens") or [] if token["id"] < vocab_size]
            added = {token["id"]: token for token in source["added_tokens"]}
            num_known = max([*source["model"]["vocab"].values(), *added]) + 1
            for token in added.values():
                # DeepSeek's <think> and tool markers aren't "special", so that a decoded text shows them. But guided
                # text must never hold them, not even within a JSON string.
                token["special"] = token["special"] or (token["content"].startswith("<") and len(token["content"]) > 1)
            source["truncation"] = source["padding"] = None
            tokenizer = llguidance.LLTokenizer(json.dumps(source), n_vocab=vocab_size, eos_token=sorted(end_ids))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise GuideError(f"{path} can't be used for guided decoding: {one_line(error)}") from error
        if num_known > vocab_size:
            raise GuideError(f"{path} has ids up to {num_known - 1}, the model has {vocab_size}")
        not_text = [index for index, token in added.items() if token["special"]]
        return cls(tokenizer, [*not_text, *range(num_known, vocab_size)], end_ids)

    def is_allowed(self, token: int) -> bool:
        """Return whether the token is text or an end token."""
        return 0 <= token < self.num_words * 32 and bool(self.allowed_mask[token >> 5] >> np.uint32(token & 31) & 1)

    def matcher(self, grammar: str) -> llguidance.LLMatcher:
        """Return a matcher for `grammar`. An invalid grammar doesn't raise; the matcher's `is_error` reports it."""
        import llguidance

        return llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
