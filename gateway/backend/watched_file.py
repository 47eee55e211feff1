"""WatchedFile: what a file holds now, while others replace it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

LOOK_S = 0.2  # the file is looked at this often at most
Content = TypeVar("Content")


class WatchedFile(Generic[Content]):
    """The content of the file at `path`, read again when it has changed; "": always `empty`, as without the file.

    read: the file's text → its content; `ValueError`: it is wrong, and then what was read last holds.
    """

    def __init__(self, path: str, read: Callable[[str], Content], empty: Content) -> None:
        self._path = Path(path).expanduser() if path else None
        self._read, self._empty, self._content = read, empty, empty
        self._version: tuple[int, ...] | None = None
        self._looked_at = -math.inf

    def current(self) -> Content:
        """The content now."""
        now = time.monotonic()
        if self._path is not None and now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._look(self._path)
        return self._content

    def _look(self, path: Path) -> None:
        try:
            status = path.stat()
            version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if version == self._version:
                return
            self._version = version
            self._content = self._read(path.read_text(encoding="utf-8"))
            log.info("%s was read: %s", path, self._content)
        except FileNotFoundError:
            self._content, self._version = self._empty, None
        except (OSError, ValueError) as error:
            log.error("what was read last still holds: %s: %s", path, error)
