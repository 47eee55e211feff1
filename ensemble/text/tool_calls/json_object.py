"""Finds the end of a JSON object in streamed text.

The text begins with `{` and may be split anywhere. The scanner follows strings and brackets only; it neither parses nor
validates the object.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from deepseek_triton.ensemble.text.partial_match import partial_len

_IN_STRING = re.compile(r'["\\]')


class ObjectScanner:
    """Counts brackets outside of strings, up to the object's end or to a stop marker that ends it early.

    Markers within a string are ignored: a model may write about tool calls in a call's arguments.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._outside = re.compile("|".join([r'["{}\[\]]', *map(re.escape, stops)]))
        self._depth = 0
        self._in_string = False
        self.is_done = False

    def scan(self, text: str, final: bool) -> int:
        """Return how many characters of `text` belong to the object. Pass the others again with the next text."""
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
                if position == len(text) and not final:  # the escaped character hasn't arrived yet
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
