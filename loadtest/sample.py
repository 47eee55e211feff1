"""One request as it was seen from outside, and many of them as columns of a JSON file.

All times are seconds since the warm-up's end, on one clock. Latencies start when the request was due, not when it was
sent: a generator that falls behind, or waits, would otherwise leave out what its users had to wait for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

DECIMALS = 4  # of a second: a tenth of a millisecond
# An answer that ended so was cut off by something other than the model or the limit.
NOT_COMPLETE = ("", "cancelled", "error")


@dataclass(frozen=True)
class Sample:
    """One request."""

    protocol: str
    due_s: float
    sent_s: float
    first_s: float | None  # when the first response came; None: none did
    end_s: float  # when the last response came, or the error
    num_input_tokens: int
    num_output_tokens: int
    num_first_tokens: int  # tokens in the first response
    num_responses: int
    max_gap_s: float  # the longest wait between two responses
    finish_reason: str
    error: str  # "": none

    @property
    def is_complete(self) -> bool:
        """Whether the whole answer came: no error, and an end that says why it is one."""
        return not self.error and self.finish_reason not in NOT_COMPLETE

    @property
    def is_streamed(self) -> bool:
        """Whether the answer came in pieces, so that its first token was seen to come."""
        return self.protocol.endswith("-stream")

    @property
    def late_s(self) -> float:
        """How long after it was due the request was sent."""
        return self.sent_s - self.due_s

    @property
    def latency_s(self) -> float:
        """From due to the last response."""
        return self.end_s - self.due_s

    @property
    def first_token_s(self) -> float | None:
        """From due to the first response of a stream."""
        return self.first_s - self.due_s if self.first_s is not None and self.is_streamed else None

    @property
    def inter_token_s(self) -> float | None:
        """Mean seconds a token after the first response.

        A response may carry several tokens, so the time is divided by tokens, not by responses. None for an answer
        whose first response held all of it.
        """
        more = self.num_output_tokens - self.num_first_tokens
        if self.first_s is None or not self.is_streamed or more <= 0:
            return None
        return (self.end_s - self.first_s) / more


_KINDS = get_type_hints(Sample)


def to_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Field → its value in each sample."""
    return {
        name: [_rounded(getattr(sample, name)) for sample in samples]
        for name in (f.name for f in dataclasses.fields(Sample))
    }


def from_columns(columns: Mapping[str, Any]) -> list[Sample]:
    """Read what `to_columns` gave. Raises `ValueError`."""
    if not isinstance(columns, Mapping) or set(columns) != set(_KINDS):
        raise ValueError(f"samples must have the columns {', '.join(_KINDS)}")
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError("samples must have columns of one length")
    rows = zip(*(columns[name] for name in _KINDS), strict=True)
    return [Sample(*row) for row in rows]


def _rounded(value: Any) -> Any:
    return round(value, DECIMALS) if isinstance(value, float) else value
