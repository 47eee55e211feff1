"""tritonserver's log → which models are loaded, and why a start failed.

The patterns are those of Triton 2.51; where none of them matches, the last lines are the reason.
"""

from __future__ import annotations

import re

from deepseek_triton.ensemble.processes.heartbeat import signal_name

_LOADED = re.compile(r"successfully loaded '([^']+)'")

_FAILED = re.compile(r"failed to load '(?P<name>[^']+)' version \d+: (?P<why>.*?)\"?$", re.MULTILINE)

# The lines that say why a start failed, the most specific pattern first.
_REASONS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"failed to load (?P<why>'[^']+' version \d+: .*?)\"?$",
        r"(?P<why>Error parsing text-format .*)$",
        r"model_repository_manager\.cc:\d+\] \"(?P<why>.*?)\"?$",
        r"^(?P<why>.*(?:Bad option|option format is|unrecognized option|Address already in use).*)$",
        r"^error: creating server: (?P<why>.*)$",
        r"^E\d{4} \S+ \d+ \S+\] \"(?!CudaDriverHelper)(?P<why>.*?)\"?$",
    )
)
# ensemble/processes/watchdog.py: why it killed the server.
_KILLED = re.compile(
    r"(?P<why>(?:the \w+'s process|tritonserver) [\w ]+); ending the server, which would hang"
    r"(?: \(model (?P<model>\S+)\))?"
)
_LAST_LINES = 5
_TRACEBACK = r"\n\nAt:"  # the log writes a line break inside a message as these two characters
_PREFIXES = ("Internal: ", "Invalid argument: ")


def loaded_models(log: str) -> list[str]:
    """The models loaded so far, in order."""
    return list(dict.fromkeys(_LOADED.findall(log)))


def failed_models(log: str) -> dict[str, str]:
    """Model → why it isn't loaded, on one line; an ensemble has the reasons of its parts."""
    reasons: dict[str, list[str]] = {}
    for match in _FAILED.finditer(log):
        reasons.setdefault(match["name"], []).append(_plain(match["why"]))
    return {name: "; ".join(dict.fromkeys(why)) for name, why in reasons.items()}


def failure(log: str) -> str:
    """Why the server ended, on one line: each failed model's error, else the last lines of the log."""
    for reason in _REASONS:
        if found := [_plain(match["why"]) for match in reason.finditer(log)]:
            return "; ".join(dict.fromkeys(found))
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " | ".join(lines[-_LAST_LINES:]) or "it wrote no log"


def death(log: str, status: int) -> str:
    """Why the server ended with exit status `status`, negative for a signal, on one line.

    What a killed process wrote last isn't the reason: there only a watchdog's line counts, which killed the server.
    """
    if found := list(_KILLED.finditer(log)):
        return f"tritonserver was ended: {found[-1]['why']}"
    if status < 0:
        return f"tritonserver was killed by {signal_name(-status)}"
    return f"tritonserver ended with status {status}: {failure(log)}"


def killed_by(log: str) -> str | None:
    """The served model whose watchdog killed the server; None: none did."""
    found = list(_KILLED.finditer(log))
    return found[-1]["model"] if found else None


def _plain(message: str) -> str:
    message = message.split(_TRACEBACK)[0]
    for prefix in _PREFIXES:
        message = message.replace(prefix, "", 1)
    return message.replace("\\n", " ").strip()
