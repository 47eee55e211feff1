"""tritonserver's log → which models are loaded, and why a start failed.

The patterns are those of Triton 2.51; where none of them matches, the last lines are the reason.
"""

from __future__ import annotations

import re

_LOADED = re.compile(r"successfully loaded '([^']+)'")

# The lines that say why a start failed, the most specific pattern first.
_REASONS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"(?P<why>the \w+'s process has died)",  # ensemble/processes/watchdog.py
        r"failed to load (?P<why>'[^']+' version \d+: .*?)\"?$",
        r"(?P<why>Error parsing text-format .*)$",
        r"model_repository_manager\.cc:\d+\] \"(?P<why>.*?)\"?$",
        r"^(?P<why>.*(?:Bad option|option format is|unrecognized option|Address already in use).*)$",
        r"^error: creating server: (?P<why>.*)$",
        r"^E\d{4} \S+ \d+ \S+\] \"(?!CudaDriverHelper)(?P<why>.*?)\"?$",
    )
)
_LAST_LINES = 5
_TRACEBACK = r"\n\nAt:"  # the log writes a line break inside a message as these two characters
_PREFIXES = ("Internal: ", "Invalid argument: ")


def loaded_models(log: str) -> list[str]:
    """The models loaded so far, in order."""
    return list(dict.fromkeys(_LOADED.findall(log)))


def failure(log: str) -> str:
    """Why the server ended, on one line: each failed model's error, else the last lines of the log."""
    for reason in _REASONS:
        if found := [_plain(match["why"]) for match in reason.finditer(log)]:
            return "; ".join(dict.fromkeys(found))
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:]) or "it wrote no log"


def _plain(message: str) -> str:
    message = message.split(_TRACEBACK)[0]
    for prefix in _PREFIXES:
        message = message.replace(prefix, "", 1)
    return message.replace("\\n", " ").strip()
