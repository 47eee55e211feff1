"""Where a streamed JSON object ends.

What enters: text, cut anywhere, that begins with `{`. It follows strings and brackets and nothing more: what the
object means, and whether it is valid, is its reader's business.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from deepseek_triton.ensemble.text.partial_match import partial_len

_IN_STRING = re.compile(r'["\\]')


class ObjectScanner:
    """Counts brackets outside of strings, up to the object's end or to a marker that ends it early.

    A marker within a string is the string's: a model may write about tool calls in a call's arguments.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._outside = re.compile("|".join([r'["{}\[\]]', *map(re.escape, stops)]))
        self._depth = 0
        self._in_string = False
        self.is_done = False

    def scan(self, text: str, final: bool) -> int:
        """How many characters of `text` are the object's; hand the others in again, with more behind them."""
        position = 0
        while not self.is_done:
            pattern = _IN_STRING if self._in_string else self._outside
            found = pattern.search(text, position)
            if found is None:
                held = 0 if final or self._in_string else partial_len(text[position:], self._stops)
                return len(text) - held
            symbol = found.group()
            position = found.end()
            if symbol == "\\":
                if position == len(text) and not final:  # what it escapes decides
                    return found.start()
                position = min(position + 1, len(text))
            elif symbol == '"':
                self._in_string = not self._in_string
            elif symbol in "{[":
                self._depth += 1
            elif symbol in "}]":
                self._depth -= 1
                self.is_done = self._depth == 0
            else:
                self.is_done = True
                return found.start()
        return position
