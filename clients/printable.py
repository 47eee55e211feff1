"""Text of a model or a server on a terminal: its control characters are shown, and do nothing there.

An answer could otherwise clear the screen, change the window's title or write what looks like a prompt.
"""

from __future__ import annotations

import re
from typing import TextIO

# C0 but for tab and newline, delete, C1, and the two separators that some terminals take for the end of a line.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def printable(text: str) -> str:
    """`text` with each control character but tab and newline as its escape: an escape character is \\x1b."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def shown(text: str, stream: TextIO) -> str:
    """`text` as it goes to `stream`: printable on a terminal, as it is in a pipe or a file."""
    return printable(text) if stream.isatty() else text


def escape_json(text: str) -> str:
    """JSON with the control characters escaped that JSON itself allows in a string."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
