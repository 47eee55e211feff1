"""Results of a batch on the disk: segments that one process each writes, and the files that they become.

A segment's bytes count once Redis knows of them. A process that was taken for dead and goes on writing has a segment of
its own, so what it writes counts no more, and nothing has to be cut off.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from deepseek_triton.gateway.jobs.batches.batch import Batch, Segment
from deepseek_triton.gateway.jobs.batches.queue import LineResult

# Why a line has no response, by its batch's end → code and message.
UNANSWERED = {
    "expired": ("batch_expired", "this request did not end before the batch's completion window was over"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was answered"),
    "": ("result_lost", "the queue has lost this request's result"),
}
COPY_BYTES = 1 << 20


def line_of(row: LineResult) -> tuple[bytes, bool]:
    """The line that tells a result, and whether it is a success."""
    is_completed = row.status == "completed"
    response = row.response if row.status in ("completed", "failed") and row.response else "null"
    error = "null" if response != "null" else row.error or "null"
    if row.status in UNANSWERED:
        error = unanswered(row.status)
    # The response is JSON already; whatever stands between its values, a line has no line breaks.
    response = response.replace("\n", " ").replace("\r", " ")
    head = f'{{"id":{json.dumps(row.job_id)},"custom_id":{json.dumps(row.custom_id)}'
    return f'{head},"response":{response},"error":{error}}}\n'.encode(), is_completed


def unanswered(status: str) -> str:
    """JSON of the error of a line that was never answered."""
    code, message = UNANSWERED[status]
    return json.dumps({"code": code, "message": message})


class SegmentWriter:
    """A segment that this process writes, below `folder`. written: what of it is on the disk."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self.written = Segment(name)
        self._output: BinaryIO = _path(folder, name, "output").open("ab")
        self._error: BinaryIO = _path(folder, name, "error").open("ab")

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.close()
        self._error.close()
        if not self.written.num_output and not self.written.num_error:
            for suffix in ("output", "error"):
                _path(self._folder, self.written.name, suffix).unlink(missing_ok=True)

    def write(self, rows: Iterable[LineResult]) -> dict[str, bool]:
        """Write results through to the disk; each one's job, and whether it is a success."""
        outcomes = {}
        for row in rows:
            text, is_completed = line_of(row)
            (self._output if is_completed else self._error).write(text)
            outcomes[row.job_id] = is_completed
        for stream in (self._output, self._error):
            stream.flush()
            os.fsync(stream.fileno())
        self.written = Segment(self.written.name, self._output.tell(), self._error.tell())
        return outcomes


def join(folder: Path, segments: Sequence[Segment], kind: str, name: str) -> Path:
    """Write one file of what counts of all segments; kind: "output" or "error". name: of this attempt."""
    path = folder / f"{kind}.{name}.whole"
    with path.open("wb") as whole:
        for segment in segments:
            num_bytes = segment.num_output if kind == "output" else segment.num_error
            if num_bytes:
                with _path(folder, segment.name, kind).open("rb") as part:
                    for block in _blocks(part, num_bytes):
                        whole.write(block)
        whole.flush()
        os.fsync(whole.fileno())
    return path


def remove(folder: Path) -> None:
    """Remove what the batch needed while it ran."""
    shutil.rmtree(folder, ignore_errors=True)


def job_id_of(batch: Batch, number: int) -> str:
    """The job of a line, as the queue's scripts call it."""
    return f"batch_req_{batch.id.removeprefix('batch_')}_{number}"


def _blocks(part: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes:
        block = part.read(min(num_bytes, COPY_BYTES))
        if not block:
            raise OSError(f"{part.name} has {num_bytes} bytes less than were noted")
        num_bytes -= len(block)
        yield block


def _path(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{kind}.{name}"
