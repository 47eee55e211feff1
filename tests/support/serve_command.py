"""`deepseek-triton serve` as a program that a test runs."""

from __future__ import annotations

import subprocess


def shown_until_ready(process: subprocess.Popen[str]) -> str:
    """What `serve` has printed when its server is ready; it fails if `serve` ends before that."""
    assert process.stdout is not None
    shown = ""
    while "Ctrl-C stops the server" not in shown:
        line = process.stdout.readline()
        assert line, f"serve ended: {shown}"
        shown += line
    return shown
