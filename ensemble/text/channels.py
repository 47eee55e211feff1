"""Splits a model's streamed text into reasoning, answer text and tool calls.

The text may be split anywhere. This module knows nothing of tokens or tensors.
"""

from __future__ import annotations

from typing import NamedTuple

from deepseek_triton.ensemble.text.reasoning import ReasoningSplitter
from deepseek_triton.ensemble.text.tool_calls.formats import ToolFormat
from deepseek_triton.ensemble.text.tool_calls.parser import ToolCallDelta, ToolCallParser


class Channels(NamedTuple):
    """The increment of each channel."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class ChannelSplitter:
    """Splits one sequence's text into its channels. Reasoning comes first; tool calls are parsed in the answer only.

    Args:
        is_reasoning_open: whether the prompt ends inside `<think>`; None: reasoning isn't separated.
        tool_format: None: tool calls aren't parsed.
    """

    def __init__(self, is_reasoning_open: bool | None, tool_format: ToolFormat | None) -> None:
        self._reasoning = None if is_reasoning_open is None else ReasoningSplitter(is_reasoning_open)
        self._tool_calls = None if tool_format is None else ToolCallParser(tool_format)

    def push(self, text: str, final: bool = False) -> Channels:
        """Return what `text` completes in each channel; `final` flushes what is held back."""
        reasoning = ""
        calls: tuple[ToolCallDelta, ...] = ()
        if self._reasoning is not None:
            reasoning, text = self._reasoning.push(text, final)
        if self._tool_calls is not None:
            text, calls = self._tool_calls.push(text, final)
        return Channels(text, reasoning, calls)
