"""A model's text to what a client reads apart: reasoning, text, tool calls.

What enters: text, cut anywhere, and what the chat template said of it. It knows nothing of tokens or tensors.
"""

from __future__ import annotations

from typing import NamedTuple

from deepseek_triton.ensemble.text.reasoning import ReasoningSplitter
from deepseek_triton.ensemble.text.tool_calls.formats import ToolFormat
from deepseek_triton.ensemble.text.tool_calls.parser import ToolCallDelta, ToolCallParser


class Channels(NamedTuple):
    """What one piece of text added to each."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class ChannelSplitter:
    """One sequence's text to its channels: reasoning first, tool calls in the answer alone.

    None switches a part off: the text then passes it unchanged, at no cost.
    """

    def __init__(self, is_reasoning_open: bool | None, tool_format: ToolFormat | None) -> None:
        self._reasoning = None if is_reasoning_open is None else ReasoningSplitter(is_reasoning_open)
        self._tool_calls = None if tool_format is None else ToolCallParser(tool_format)

    def push(self, text: str, final: bool = False) -> Channels:
        """What `text` completes in each channel; with `final`, all that is left."""
        reasoning = ""
        calls: tuple[ToolCallDelta, ...] = ()
        if self._reasoning is not None:
            reasoning, text = self._reasoning.push(text, final)
        if self._tool_calls is not None:
            text, calls = self._tool_calls.push(text, final)
        return Channels(text, reasoning, calls)
