r"""The model's reasoning, apart from its answer: DeepSeek's `<think>` convention over streamed text.

What enters: text, cut anywhere. What leaves: the same text in two parts, without the tags. It knows nothing
of tokens, chat templates or tool calls.

White space stays where the model put it, as in vLLM and SGLang: R1's answer begins with the "\n\n" that follows
its `</think>`. Only what precedes the opening tag is dropped with it.
"""

from __future__ import annotations

from typing import NamedTuple

from deepseek_triton.ensemble.text.partial_match import partial_len

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"


class ReasoningSplit(NamedTuple):
    """What one piece of text added to the reasoning and to the answer."""

    reasoning: str
    text: str


def opens_reasoning(prompt: str) -> bool:
    r"""Does the prompt end in an opened `<think>`, so that the model's first words are reasoning?

    R1's templates do; Qwen3's `<think>\n\n</think>\n\n` is closed again. A tag with words behind it is one that
    somebody wrote about: the templates write nothing but white space after theirs.
    """
    return prompt.rstrip().endswith(OPEN_TAG)


class ReasoningSplitter:
    """One sequence's text, as it comes, to reasoning and answer.

    One section of reasoning, at the very beginning; white space may precede its tag. With `is_open` the prompt
    has opened it already: a model that writes the tag nevertheless writes it in vain. In the answer a later tag
    is plain text. A text that ends within the section is all reasoning.

    Nothing of a tag leaks to either side; what turns out to be no tag comes out as it was. The parts joined don't
    depend on how the text was cut.
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
        """The parts that `text` completes; with `final`, all that is left. Nothing may follow a final push."""
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
