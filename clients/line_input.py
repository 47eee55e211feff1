"""What a user types or pipes in → messages, one at a time.

On a terminal a line is edited with readline, which keeps a history; lines that are pasted together are one message, and
so is a block between two lines of three double quotes. Without a terminal each line is a message.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

PROMPT, CONTINUATION = "> ", "… "
BLOCK = '"""'
NOT_UTF8 = "it is not UTF-8 text"


class LineInput:
    """Reads messages from standard input."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        if self.is_terminal:
            _enable_editing()

    def read(self) -> str | None:
        """The next message; None at the end of input.

        Raises:
            ValueError: what came isn't UTF-8.
        """
        try:
            text = self._read_terminal() if self.is_terminal else _read_line()
            if text is not None:
                text.encode()  # under a C locale Python reads other bytes as lone surrogates
        except UnicodeError:
            raise ValueError(f"a line of standard input can't be read: {NOT_UTF8}") from None
        return text

    def _read_terminal(self) -> str | None:
        line = _ask(PROMPT)
        if line is None or line.strip() != BLOCK:
            return line
        lines: list[str] = []
        while (line := _ask(CONTINUATION)) is not None and line.strip() != BLOCK:
            lines.append(line)
        return "\n".join(lines)


def read_lines() -> Iterator[str]:
    """The lines of standard input, without their ends.

    Raises:
        ValueError: what came isn't UTF-8.
    """
    try:
        for line in sys.stdin:
            yield line.removesuffix("\n")
    except UnicodeError:
        raise ValueError(f"a line of standard input can't be read: {NOT_UTF8}") from None


def read_everything() -> str:
    """All of standard input.

    Raises:
        ValueError: it isn't UTF-8.
    """
    try:
        text = sys.stdin.read()
        text.encode()
    except UnicodeError:
        raise ValueError(f"standard input can't be read: {NOT_UTF8}") from None
    return text


def _read_line() -> str | None:
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def _ask(prompt: str) -> str | None:
    try:
        # input() edits lines only where its prompt goes to a terminal; it must not get into output that goes elsewhere.
        if sys.stdout.isatty():
            return input(prompt)
        print(prompt, end="", flush=True, file=sys.stderr)
        return input()
    except EOFError:
        print(file=sys.stderr)
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise


def _enable_editing() -> None:
    """Importing readline is what makes input() use it; some builds of Python have none."""
    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
