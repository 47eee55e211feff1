"""Tensors read by another thread before they are asked for, so that the disk and the cores work at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

Read = Callable[[str], NDArray[Any]]
MAX_BYTES = 2**30  # that may wait; a larger tensor waits alone


class TensorPrefetch:
    """A context manager whose `read` gives the tensors `names` in their order, each once.

    Args:
        read: reads a tensor by name; the thread calls it.
    """

    def __init__(self, read: Read, names: Sequence[str], max_bytes: int = MAX_BYTES) -> None:
        self._read, self._names, self._max_bytes = read, names, max_bytes
        self._ready: deque[tuple[str, NDArray[Any] | Exception]] = deque()
        self._num_bytes, self._is_closed = 0, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)

    def __enter__(self) -> TensorPrefetch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def read(self, name: str) -> NDArray[Any]:
        """The next tensor, which must be `name`; raises what reading it raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or not self._thread.is_alive())
            if not self._ready or self._ready[0][0] != name:
                expected = self._ready[0][0] if self._ready else "nothing more"
                raise ValueError(f"{name} asked for, {expected} comes next")
            _, found = self._ready.popleft()
            if isinstance(found, Exception):
                raise found
            self._num_bytes -= found.nbytes
            self._changed.notify_all()
        return found

    def _work(self) -> None:
        for name in self._names:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._num_bytes < self._max_bytes)
                if self._is_closed:
                    return
            found: NDArray[Any] | Exception
            try:
                found = self._read(name)
            except Exception as error:
                found = error
            with self._changed:
                self._ready.append((name, found))
                self._num_bytes += 0 if isinstance(found, Exception) else found.nbytes
                self._changed.notify_all()
            if isinstance(found, Exception):
                return
