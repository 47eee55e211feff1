"""A named pipe by which the detokenizer acknowledges each response to the engine; both run on one host.

Triton runs the later steps of an ensemble only while a client waits for the result, and it doesn't tell the engine when
a client has gone. An engine that gets no acknowledgements for a sequence knows it from that. A message is the id of
a sequence, 8 bytes.

A detokenizer that a busy machine doesn't run acknowledges nothing either, and its clients haven't gone. So its process
writes down ten times a second that it runs, in a file of its own: the times of its last beats, 8 bytes each.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deepseek_triton.ensemble.processes.watchdog import meeting_point

PIPE_BYTES = 65536
BEAT_S = 0.1  # between two beats of the detokenizer
NUM_BEATS = 64  # that are kept


def pipe_path(name: str, version: str | int, server_pid: int | None = None) -> Path:
    """The pipe of version `version` of the served model `name` under this process's server."""
    return meeting_point(name, version, "pipe", server_pid)


def _beats_path(pipe: Path) -> Path:
    return pipe.with_name(f"{pipe.name}-beats")


class AcknowledgementReceiver:
    """The engine's end: creates the pipe and reads it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # left by an engine that was killed; its detokenizer notices and opens this one
        os.mkfifo(path, 0o600)
        # Open for writing too: a pipe without a writer would read as closed.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def drain(self) -> list[int]:
        """Return the sequence ids of the responses acknowledged since the last call, without waiting."""
        try:
            data = os.read(self._fd, PIPE_BYTES)
        except BlockingIOError:
            return []
        ids: list[int] = np.frombuffer(data, np.uint64).tolist()
        return ids

    def life_since(self, began: float) -> float:
        """Seconds of those since `began` (`time.monotonic()`) in which the detokenizer ran; inf: it isn't known."""
        try:
            beats = np.frombuffer(_beats_path(self._path).read_bytes(), np.float64)
        except (OSError, ValueError):  # a full disk holds no file
            return math.inf
        since = int((beats > began).sum())
        return math.inf if since == NUM_BEATS else since * BEAT_S

    def close(self) -> None:
        """Close and remove the pipe."""
        os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


class AcknowledgementSender:
    """The detokenizer's end: opened at the first message, and again after the engine was restarted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._beats = deque((0.0,) * NUM_BEATS, NUM_BEATS)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="acknowledgements", daemon=True)
        self._thread.start()

    def send(self, sequence_ids: Iterable[int]) -> None:
        """Acknowledge one response of each sequence, without waiting.

        The message is dropped if the pipe is full or has no reader: a reader 8,192 responses behind has stopped.
        """
        message = np.fromiter(sequence_ids, np.uint64).tobytes()
        for _ in range(2):  # the second try opens the new pipe of a restarted engine
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
                self._disconnect()

    def close(self) -> None:
        """Close this end."""
        self._is_closed.set()
        self._thread.join()
        _beats_path(self._path).unlink(missing_ok=True)
        self._disconnect()

    def _disconnect(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _beat(self) -> None:
        while not self._is_closed.wait(BEAT_S):
            self._beats.append(time.monotonic())
            with contextlib.suppress(OSError):  # a full disk: the next beat tries again
                fd = os.open(_beats_path(self._path), os.O_WRONLY | os.O_CREAT, 0o600)
                try:
                    os.pwrite(fd, np.array(self._beats).tobytes(), 0)
                finally:
                    os.close(fd)
