"""The prefill budget: how many prompt tokens a step computes, so that running streams don't stall.

While sequences decode, a step's prefill may take at most `max_stall` times as long as the decode. The number of tokens
depends on the model and the machine, so it is adapted to the measured times. This module sees token counts and seconds,
and knows nothing of sequences.
"""

from __future__ import annotations

MIN_TOKENS = 8  # eight tokens may take as long as one
FIRST_TOKENS = 16
GROWTH = 1.25  # maximum factor from one step to the next
SPARE = 0.8  # the budget grows if the prefill took less than this share of the allowed time
DECODE_WEIGHT = 0.2  # weight of the newest decode time in the moving average


class PrefillBudget:
    """The number of tokens that a step may prefill: `chunk` if no sequence decodes, else the adapted number."""

    def __init__(self, chunk: int, max_stall: float) -> None:
        self._chunk = chunk
        self._max_stall = max_stall
        self._tokens = float(min(FIRST_TOKENS, chunk))
        self._decode_s = 0.0

    @property
    def decode_s(self) -> float:
        """The moving average of a step's decode time, in seconds; 0 before the first decode."""
        return self._decode_s

    def tokens(self, *, is_decoding: bool) -> int:
        """Return the maximum number of prompt tokens for the next step."""
        return int(self._tokens) if is_decoding else self._chunk

    def observe_decode(self, seconds: float, *, at_most: bool = False) -> None:
        """Record a step's decode time; `at_most` says that `seconds` is an upper bound, not a measurement."""
        if self._decode_s and at_most:
            self._decode_s = min(self._decode_s, seconds)
        elif self._decode_s:
            self._decode_s += DECODE_WEIGHT * (seconds - self._decode_s)
        else:
            self._decode_s = seconds

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Record that prefilling `tokens` in a step with a decode took `seconds`, and adapt the budget."""
        allowed = self._max_stall * self._decode_s
        lowest = min(MIN_TOKENS, self._chunk)
        if seconds > allowed:
            self._tokens = max(lowest, min(self._tokens, tokens * allowed / seconds))
        elif tokens >= int(self._tokens) and seconds < SPARE * allowed:
            self._tokens = min(self._chunk, self._tokens * GROWTH)
