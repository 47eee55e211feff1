"""How much of the waiting prompts one step computes, so that running streams don't stall.

It sees token counts and seconds, and knows nothing of sequences. Beside running sequences a step's prefill may take
`max_stall` times as long as their decode; how many tokens that is depends on the model and the machine, so it is
learnt from the steps themselves.
"""

from __future__ import annotations

MIN_TOKENS = 8  # a machine may need as long for one token as for eight
FIRST_TOKENS = 16
GROWTH = 1.25  # at most, from one step to the next
SPARE = 0.8  # of the allowed time; below it the budget grows
DECODE_WEIGHT = 0.2  # of the newest decode in their moving average


class PrefillBudget:
    """Tokens that a step may prefill: all of `chunk` while nothing else runs, else what was learnt."""

    def __init__(self, chunk: int, max_stall: float) -> None:
        self._chunk = chunk
        self._max_stall = max_stall
        self._tokens = float(min(FIRST_TOKENS, chunk))
        self._decode_s = 0.0

    @property
    def decode_s(self) -> float:
        """How long a step's decode usually takes, in seconds; 0 before the first."""
        return self._decode_s

    def tokens(self, *, is_decoding: bool) -> int:
        """The most tokens of prompts for the next step."""
        return int(self._tokens) if is_decoding else self._chunk

    def observe_decode(self, seconds: float, *, at_most: bool = False) -> None:
        """A step's decode took so long; or `at_most` so long, for it had ended before anybody looked."""
        if self._decode_s and at_most:
            self._decode_s = min(self._decode_s, seconds)
        elif self._decode_s:
            self._decode_s += DECODE_WEIGHT * (seconds - self._decode_s)
        else:
            self._decode_s = seconds

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Beside a decode, prefilling `tokens` took so long."""
        allowed = self._max_stall * self._decode_s
        lowest = min(MIN_TOKENS, self._chunk)
        if seconds > allowed:
            self._tokens = max(lowest, min(self._tokens, tokens * allowed / seconds))
        elif tokens >= int(self._tokens) and seconds < SPARE * allowed:
            self._tokens = min(self._chunk, self._tokens * GROWTH)
