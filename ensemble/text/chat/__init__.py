"""Chat messages → a prompt: validates the client's JSON and runs the checkpoint's Jinja template.

It knows the chat formats of OpenAI and Hugging Face; it knows nothing of tokens.
"""

from deepseek_triton.ensemble.text.chat.control_tokens import NO_CONTROL_TOKENS, ControlTokens
from deepseek_triton.ensemble.text.chat.messages import PARSE_CONTROL_TOKENS, parse_messages
from deepseek_triton.ensemble.text.chat.renderer import RenderLimits, end_workers
from deepseek_triton.ensemble.text.chat.template import ChatTemplate

__all__ = [
    "NO_CONTROL_TOKENS",
    "PARSE_CONTROL_TOKENS",
    "ChatTemplate",
    "ControlTokens",
    "RenderLimits",
    "end_workers",
    "parse_messages",
]
