"""Batch: a file of requests that are answered within a window of time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ENDED = ("completed", "failed", "expired", "cancelled")
ID = re.compile(r"batch_[0-9a-f]{32}")
TIMES = ("created", "in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


class BatchesFullError(Exception):
    """This owner has as many batches as it may."""


class BatchEndedError(Exception):
    """A batch that has ended can't be cancelled."""


class BatchLeaseError(Exception):
    """This process doesn't run the batch any more."""


@dataclass(frozen=True)
class NewBatch:
    """What a client submits. store: the id of the directory that holds the file.
    caller: on whose account shares of models are dealt. output_s: how long results are kept."""

    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    window_s: float
    metadata: Mapping[str, str] | None
    store: str
    caller: str = ""
    output_s: float | None = None


@dataclass(frozen=True)
class Segment:
    """A part of a batch's results, which one process writes. num_…: bytes that count; what is behind them doesn't."""

    name: str
    num_output: int = 0
    num_error: int = 0


@dataclass(frozen=True)
class Batch:
    """A batch as Redis keeps it.

    times: seconds since 1970 by their names in `TIMES`. total, completed, failed: lines. fed_lines, fed_bytes: how much
    of its file has been read. num_open: lines that are in the queue, or whose result isn't written yet.
    """

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    times: Mapping[str, float]
    total: int = 0
    completed: int = 0
    failed: int = 0
    metadata: Mapping[str, str] | None = None
    errors: Sequence[Mapping[str, Any]] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_s: float | None = None
    fed_lines: int = 0
    fed_bytes: int = 0
    segments: Sequence[Segment] = field(default=())

    @classmethod
    def from_hash(cls, batch_id: str, fields: Mapping[bytes, bytes]) -> Batch:
        """The batch of a Redis hash."""
        text = {name.decode(): value.decode() for name, value in fields.items()}

        def number(name: str) -> int:
            return int(text.get(name) or 0)

        segments = [name.removeprefix("output:") for name in text if name.startswith("output:")]
        return cls(
            batch_id,
            text["owner"],
            text["endpoint"],
            text["input_file_id"],
            text["completion_window"],
            text["status"],
            {name: int(text[f"{name}_at"]) / 1000 for name in TIMES if text.get(f"{name}_at")},
            number("total"),
            number("completed"),
            number("failed"),
            json.loads(text["metadata"]),
            json.loads(text.get("errors") or "[]"),
            text.get("output_file_id") or None,
            text.get("error_file_id") or None,
            float(text["output_s"]) if text.get("output_s") else None,
            number("fed_lines"),
            number("fed_bytes"),
            [Segment(name, number(f"output:{name}"), number(f"error:{name}")) for name in sorted(segments)],
        )

    @property
    def has_ended(self) -> bool:
        """Whether it will change no more."""
        return self.status in ENDED

    def form(self) -> dict[str, Any]:
        """The batch as OpenAI's API tells it. Files are told once they are whole."""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": list(self.errors)} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id if self.has_ended else None,
            "error_file_id": self.error_file_id if self.has_ended else None,
            **{f"{name}_at": int(self.times[name]) if name in self.times else None for name in TIMES},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }
