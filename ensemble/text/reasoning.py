r"""Separates a model's reasoning from its answer in streamed text, by DeepSeek's `<think>` convention.

The text may be split anywhere; the tags are removed. This module knows nothing of tokens, chat templates or tool calls.

White space is kept, as in vLLM and SGLang: R1's answer begins with the "\n\n" that follows its `</think>`. Only white
space before the opening tag is dropped.
"""

from __future__ import annotations

from typing import NamedTuple

from deepseek_triton.ensemble.text.partial_match import partial_len

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"


class ReasoningSplit(NamedTuple):
    """The increments of the reasoning and of the answer."""

    reasoning: str
    text: str


def opens_reasoning(prompt: str) -> bool:
    r"""Return whether the prompt ends with an open `<think>`, so that the output begins with reasoning.

    R1's templates end so; Qwen3's `<think>\n\n</think>\n\n` is closed. A tag that other text follows is a mention of
    the tag: templates write only white space after theirs.
    """
    return prompt.rstrip().endswith(OPEN_TAG)


class ReasoningSplitter:
    """Splits one sequence's text into reasoning and answer.

    There is one section of reasoning, at the beginning; white space may precede its tag. `is_open` says that the prompt
    has opened it already; an opening tag at the start of the text is then dropped. Later tags are plain text. If the
    section isn't closed, all text is reasoning.

    No part of a tag appears in either output, and text that only resembles a tag is returned unchanged. Where the
    input is split doesn't change the joined outputs.
    """

    def __init__(self, is_open: bool, open_tag: str = OPEN_TAG, close_tag: str = CLOSE_TAG) -> None:
        if not open_tag or not close_tag:
            raise ValueError(f"open_tag and close_tag must not be empty, got {open_tag!r} and {close_tag!r}")
        self._open_tag, self._close_tag = open_tag, close_tag
        self._is_reasoning = is_open
        self._is_start = True
        self._held = ""
        self._is_final = False

    def push(self, text: str, final: bool = False) -> ReasoningSplit:
        """Return what `text` completes; `final` flushes what is held back. Nothing may be pushed after it."""
        if self._is_final:
            raise RuntimeError("push after the final push: make a new ReasoningSplitter for each sequence")
        self._is_final = final
        text = self._held + text
        self._held = ""
        if self._is_start:
            stripped = text.lstrip()
            if not final and len(stripped) < len(self._open_tag) and self._open_tag.startswith(stripped):
                self._held = text
                return ReasoningSplit("", "")
            self._is_start = False
            if stripped.startswith(self._open_tag):
                self._is_reasoning = True
                text = stripped[len(self._open_tag) :]
        if not self._is_reasoning:
            return ReasoningSplit("", text)
        reasoning, tag, answer = text.partition(self._close_tag)
        if tag:
            self._is_reasoning = False
            return ReasoningSplit(reasoning, answer)
        ready = len(text) - (0 if final else partial_len(text, (self._close_tag,)))
        self._held = text[ready:]
        return ReasoningSplit(text[:ready], "")
