"""The detokenizer's acknowledgements to the engine: a named pipe between two processes of one host.

Triton runs the later steps of an ensemble only while somebody waits for their result, and it tells the running engine
nothing when nobody does. So the detokenizer acknowledges each response it receives, and an engine that hears nothing
knows that its client has gone. A message is the 8-byte id of a sequence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deepseek_triton.ensemble.processes.watchdog import meeting_point

PIPE_BYTES = 65536


def pipe_path(name: str, version: str | int, server_pid: int | None = None) -> Path:
    """The pipe of version `version` of the served model `name` under this process's server."""
    return meeting_point(name, version, "pipe", server_pid)


class AcknowledgementReceiver:
    """The engine's end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # left by an engine that was killed; its detokenizer notices and opens this one
        os.mkfifo(path, 0o600)
        # Open for writing too: a pipe without a writer would read as closed.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def drain(self) -> list[int]:
        """Sequence ids, one for each response acknowledged since the last call; never waits."""
        try:
            data = os.read(self._fd, PIPE_BYTES)
        except BlockingIOError:
            return []
        ids: list[int] = np.frombuffer(data, np.uint64).tolist()
        return ids

    def close(self) -> None:
        """Close and remove the pipe."""
        os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


class AcknowledgementSender:
    """The detokenizer's end; opened when first needed, and again after the engine was restarted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def send(self, sequence_ids: Iterable[int]) -> None:
        """Acknowledge one response of each sequence; never waits.

        A pipe that is full or has no reader drops the message: a reader 8,192 responses behind is not running.
        """
        message = np.fromiter(sequence_ids, np.uint64).tobytes()
        for _ in range(2):  # the second try is for a restarted engine's new pipe
            try:
                if self._fd is None:
                    fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
                    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
                        os.close(fd)
                        return
                    self._fd = fd
                os.write(self._fd, message)
                return
            except BlockingIOError:
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ENXIO):
                    raise
                self.close()

    def close(self) -> None:
        """Close this end."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
