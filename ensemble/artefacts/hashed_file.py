"""A file written and hashed by another thread, while the caller computes what comes next."""

from __future__ import annotations

import queue
import threading
from hashlib import sha256
from pathlib import Path
from types import TracebackType

BLOCKS = 2  # that may wait


class HashedFile:
    """A context manager; `sha256` is the file's, in hexadecimal, once the context has ended.

    Raises:
        OSError: the file can't be opened, or on a later call or at the end: a block couldn't be written.
    """

    def __init__(self, path: Path) -> None:
        self._stream, self._digest = path.open("wb"), sha256()
        self._blocks: queue.Queue[bytes | memoryview | None] = queue.Queue(BLOCKS)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="hashed-file", daemon=True)
        self.sha256 = ""

    def __enter__(self) -> HashedFile:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._blocks.put(None)
        self._thread.join()
        self._stream.close()
        self.sha256 = self._digest.hexdigest()
        if kind is None and self._error is not None:
            raise self._error

    def write(self, block: bytes | memoryview) -> None:
        """Add a block, which may not change afterwards."""
        if self._error is not None:
            raise self._error
        self._blocks.put(block)

    def _work(self) -> None:
        while (block := self._blocks.get()) is not None:
            if self._error is None:
                try:
                    self._stream.write(block)
                except OSError as error:
                    self._error = error
                self._digest.update(block)
