"""One request as its client measured it, and many of them as columns of a JSON file.

All times are seconds since the end of the warm-up, on one clock. Latencies start when the request was due, not when it
was sent: otherwise the time by which a slow generator sends late would be missing (coordinated omission).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

DECIMALS = 4  # seconds are stored to a tenth of a millisecond
# finish_reasons of answers that neither the model nor max_tokens ended.
NOT_COMPLETE = ("", "cancelled", "error")


@dataclass(frozen=True)
class Sample:
    """One request."""

    protocol: str
    due_s: float
    sent_s: float
    first_s: float | None  # arrival of the first response; None: there was none
    end_s: float  # arrival of the last response, or of the error
    num_input_tokens: int
    num_output_tokens: int
    num_first_tokens: int  # tokens in the first response
    num_responses: int
    max_gap_s: float  # the longest time between two responses
    finish_reason: str
    error: str  # empty: no error

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete: there is no error, and the model or max_tokens ended it."""
        return not self.error and self.finish_reason not in NOT_COMPLETE

    @property
    def is_streamed(self) -> bool:
        """Whether the answer was streamed, so that the time to first token is known."""
        return self.protocol.endswith("-stream")

    @property
    def late_s(self) -> float:
        """Seconds from when the request was due until it was sent."""
        return self.sent_s - self.due_s

    @property
    def latency_s(self) -> float:
        """Seconds from when the request was due until its last response."""
        return self.end_s - self.due_s

    @property
    def first_token_s(self) -> float | None:
        """Seconds from when the request was due until a stream's first response."""
        return self.first_s - self.due_s if self.first_s is not None and self.is_streamed else None

    @property
    def inter_token_s(self) -> float | None:
        """Mean inter-token latency after the first response, in seconds.

        A response may have several tokens, so the time is divided by the number of tokens, not of responses. None if
        the first response has all tokens.
        """
        more = self.num_output_tokens - self.num_first_tokens
        if self.first_s is None or not self.is_streamed or more <= 0:
            return None
        return (self.end_s - self.first_s) / more


_KINDS = get_type_hints(Sample)


def to_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Field → its values, one for each sample."""
    return {
        name: [_rounded(getattr(sample, name)) for sample in samples]
        for name in (f.name for f in dataclasses.fields(Sample))
    }


def from_columns(columns: Mapping[str, Any]) -> list[Sample]:
    """The inverse of `to_columns`. Raises `ValueError`."""
    if not isinstance(columns, Mapping) or set(columns) != set(_KINDS):
        raise ValueError(f"samples must have the columns {', '.join(_KINDS)}")
    if len({len(column) for column in columns.values()}) > 1:
        raise ValueError("samples must have columns of one length")
    rows = zip(*(columns[name] for name in _KINDS), strict=True)
    return [Sample(*row) for row in rows]


def _rounded(value: Any) -> Any:
    return round(value, DECIMALS) if isinstance(value, float) else value
