"""Redactor: calls the redacting function in a process of its own, for a bounded time."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from typing import Any

from deepseek_triton.gateway.collection.frames import receive, send

PROCESS = "deepseek_triton.gateway.collection.redactor_process"
START_S = 60.0  # an import may be long
GRACE_S = 0.5  # beyond the function's own time, for the way to it and back


class RedactionError(Exception):
    """The texts weren't redacted: the function failed, took too long, or its process ended."""


class RedactionTimeoutError(RedactionError):
    """The function took too long."""


class Redactor:
    """Redacts by the function called `name`, MODULE:FUNCTION, which has `seconds` for the texts of one record.

    One thread at a time calls it. A process that was ended is started again for the next record.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._seconds = name, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def start(self) -> None:
        """Start the process. Raises `RedactionError` if the function can't be loaded."""
        here, there = socket.socketpair()
        with there:
            command = [sys.executable, "-m", PROCESS, self._name, str(self._seconds), str(there.fileno())]
            self._process = subprocess.Popen(command, pass_fds=(there.fileno(),), stdin=subprocess.DEVNULL)
        self._connection = here
        try:
            self._answer(START_S)
        except RedactionError:
            self.close()
            raise

    def redact(self, texts: list[str]) -> list[str] | None:
        """The redacted texts; None: the function wants the record not to be kept. Raises `RedactionError`."""
        if self._connection is None:
            self.start()
        assert self._connection is not None
        try:
            self._connection.settimeout(self._seconds + GRACE_S)
            send(self._connection, json.dumps(texts).encode())
            found = self._answer(self._seconds + GRACE_S)["texts"]
        except OSError as error:
            self.close()
            raise RedactionError(f"the redactor's process ended: {error}") from error
        except RedactionTimeoutError:
            self.close()
            raise
        return None if found is None else [str(text) for text in found]

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._connection = self._process = None

    def _answer(self, within_s: float) -> dict[str, Any]:
        assert self._connection is not None
        try:
            message = receive(self._connection, within_s)
        except TimeoutError as error:
            raise RedactionTimeoutError(f"the redactor took longer than {self._seconds:g} s") from error
        if message is None:
            raise self._ended()
        answer: dict[str, Any] = json.loads(message)
        if "error" in answer:
            raise RedactionError(answer["error"])
        return answer

    def _ended(self) -> RedactionError:
        """Why the process has closed its side."""
        assert self._process is not None
        status: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(GRACE_S)
        self.close()
        if status == -14:  # SIGALRM
            return RedactionTimeoutError(f"the redactor took longer than {self._seconds:g} s")
        return RedactionError(f"the redactor's process ended with status {status}")
