"""CollectionFiles: a directory of JSON lines that several processes append to, within bounds of bytes and of days.

A file's name has its kind, its day (UTC) and a number: `answers-2026-03-01-0001.jsonl`. Every change happens under one
lock. A line that a kill tore is removed by the next append; readers pass it over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from deepseek_triton.gateway.collection.lines import AnswerId, decode_all, encode, key_of

Kind = Literal["answers", "feedback"]
KINDS: tuple[Kind, ...] = ("answers", "feedback")
NAME = re.compile(r"(answers|feedback)-(\d{4}-\d{2}-\d{2})-(\d{4,})\.jsonl")
LOCK = "lock"
FILES = 16  # a full collection has about so many: the oldest goes when one more is begun
MAX_FILE_BYTES = 64 << 20
BLOCK = 1 << 20


class LineTooLongError(ValueError):
    """The line is longer than a file may be."""


class CollectionFiles:
    """The files in `directory`, which is made if it isn't there. Every method raises `OSError`.

    max_bytes: of all files together; the oldest file goes first. days: a line is kept no longer.
    """

    def __init__(self, directory: Path, max_bytes: int = 1 << 30, days: int = 30) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.directory = directory
        self._max_bytes = max_bytes
        self._max_file_bytes = min(MAX_FILE_BYTES, max_bytes // FILES)
        self._days = days

    def append(self, kind: Kind, line: dict[str, Any]) -> None:
        """Add one line. A kill at any moment leaves the lines before it, and at most a part of this one.

        Raises:
            LineTooLongError: it doesn't fit into a file.
        """
        data = encode(line)
        if len(data) > self._max_file_bytes:
            raise LineTooLongError(f"a line of {len(data)} bytes exceeds {self._max_file_bytes}")
        with self._locked():
            path = self._open_file(kind, len(data))
            with path.open("ab+") as file:
                os.fchmod(file.fileno(), 0o600)
                size = _whole_bytes(file.fileno())
                os.ftruncate(file.fileno(), size)
                try:
                    _write(file.fileno(), data)
                except OSError:
                    os.ftruncate(file.fileno(), size)
                    raise
            self._remove_oldest()

    def remove_old(self, today: date | None = None) -> None:
        """Remove what has been kept for long enough: each file before a line of it is older than `days` days.

        What a killed `delete` left is removed too.
        """
        today = today or datetime.now(timezone.utc).date()
        with self._locked():
            for left in self.directory.glob(".*.jsonl.*"):
                left.unlink()
            for path in self._files():
                if _day(path) + timedelta(days=self._days) <= today:
                    path.unlink()

    def read(self, kind: Kind) -> Iterator[dict[str, Any]]:
        """All lines, the oldest first; a file that is removed meanwhile is passed over."""
        for path in self._files(kind):
            with contextlib.suppress(FileNotFoundError):
                yield from decode_all(path.read_bytes())

    def has(self, answer: AnswerId) -> bool:
        """Whether an answer is kept; reads the newest files first, in blocks that hold nobody up for long."""
        wanted = key_of(answer)
        for path in reversed(self._files("answers")):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                before = b""
                while block := file.read(BLOCK):
                    if wanted in before + block:
                        return True
                    before = block[-len(wanted) :]
        return False

    def delete(self, kind: Kind, is_wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Remove the lines that are wanted, and say how many; each file is replaced as a whole."""
        num_deleted = 0
        for path in self._files(kind):
            with self._locked(), contextlib.suppress(FileNotFoundError):
                lines = list(decode_all(path.read_bytes()))
                kept = [line for line in lines if not is_wanted(line)]
                if len(kept) < len(lines):
                    _replace(path, b"".join(map(encode, kept)))
                    num_deleted += len(lines) - len(kept)
        return num_deleted

    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(map(_size, self._files()))

    def _files(self, kind: Kind | None = None) -> list[Path]:
        """The oldest first."""
        found = {path: match for path in self.directory.iterdir() if (match := NAME.fullmatch(path.name))}
        paths = [path for path, match in found.items() if kind in (None, match[1])]
        return sorted(paths, key=lambda path: (found[path][2], int(found[path][3]), path.name))

    def _open_file(self, kind: Kind, more: int) -> Path:
        """The file that takes `more` bytes now."""
        today = datetime.now(timezone.utc).date().isoformat()
        last = next((path for path in reversed(self._files(kind)) if today in path.name), None)
        number = 1
        if last is not None:
            if _size(last) + more <= self._max_file_bytes:
                return last
            number = int(last.stem.rpartition("-")[2]) + 1
        return self.directory / f"{kind}-{today}-{number:04d}.jsonl"

    def _remove_oldest(self) -> None:
        files = self._files()
        total = sum(map(_size, files))
        for path in files[:-1]:
            if total <= self._max_bytes:
                return
            total -= _size(path)
            path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.directory / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _whole_bytes(descriptor: int) -> int:
    """The file's size without a last line that was torn."""
    size = os.fstat(descriptor).st_size
    end = size
    while end:
        begin = max(0, end - BLOCK)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _replace(path: Path, data: bytes) -> None:
    """Put `data` in the place of a file; nothing of it stays, after a power cut neither."""
    if not data:
        path.unlink()
        return
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _day(path: Path) -> date:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return date.fromisoformat(match[2])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
