"""Run a command on a pseudo-terminal: read its screen, send it keys."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

COMMAND = """
import fcntl, sys, termios
from deepseek_triton.builders.cli import main
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this process
sys.exit(main())
"""


class Terminal:
    def __init__(self, process: subprocess.Popen[bytes], fd: int) -> None:
        self.process = process
        self.screen = b""
        self._fd = fd

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, count: int = 1, timeout_s: float = 60) -> None:
        """Wait until the screen has shown `text` so many times."""
        deadline = time.monotonic() + timeout_s
        while self.screen.count(text.encode()) < count:
            assert time.monotonic() < deadline, f"no {text!r} in {self.screen.decode(errors='replace')!r}"
            with contextlib.suppress(BlockingIOError):
                self.screen += os.read(self._fd, 65536)
            time.sleep(0.01)


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """Run `deepseek-triton` on a terminal; it is killed at the end."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", COMMAND, *arguments]
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(
        command, cwd=root, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)
