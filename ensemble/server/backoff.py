"""How long to wait before a server is started again."""

from __future__ import annotations

import random

FIRST_S = 1.0
LONGEST_S = 60.0
GROWTH = 2.0
JITTER = 0.5  # of many servers that fail at once, not all start again at once


class Backoff:
    """Seconds to wait: FIRST_S at first, then twice as long each time, up to LONGEST_S, less a random part."""

    def __init__(self, draw: random.Random | None = None) -> None:
        self._draw = draw or random.Random()
        self._longest = FIRST_S

    def next_s(self) -> float:
        """Return the next wait."""
        longest = self._longest
        self._longest = min(LONGEST_S, longest * GROWTH)
        return self._draw.uniform(max(FIRST_S, longest * (1 - JITTER)), longest)

    def reset(self) -> None:
        """Begin again with the shortest wait."""
        self._longest = FIRST_S
