"""A process that is killed in the middle of writing files."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def kill_after(num_renames: int) -> None:
    """Let this process rename so many files by `Path.replace`; the next one kills it with SIGKILL."""
    replace, left = Path.replace, num_renames

    def killed(path: Path, target: Any) -> Path:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = killed  # type: ignore[assignment,method-assign]
