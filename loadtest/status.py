"""Exit statuses of `python -m deepseek_triton.loadtest.run`, and the status of a result."""

from __future__ import annotations

from enum import IntEnum

from deepseek_triton.loadtest.result import LoadTestResult


class Status(IntEnum):
    """Exit statuses. INVALID comes before MISSED: service levels are judged only if the run is valid."""

    OK = 0
    ERROR = 1
    USAGE = 2
    MISSED = 3
    INVALID = 4
    INTERRUPTED = 130


MEANINGS: dict[Status, str] = {
    Status.OK: "the run is valid and every service level holds",
    Status.ERROR: "an error, told in one line: no server, no such profile",
    Status.USAGE: "wrong usage",
    Status.MISSED: "the run is valid, and a service level was missed; the first line of the output names it",
    Status.INVALID: "the run is invalid, whatever its figures say; the first line of the output says why",
    Status.INTERRUPTED: "interrupted",
}


def status_of(result: LoadTestResult) -> Status:
    """The status of a finished run; the levels of an invalid one aren't judged."""
    if not result.is_valid:
        return Status.INVALID
    return Status.MISSED if result.missed else Status.OK


def help_text() -> str:
    """The exit statuses, as --help shows them at its end."""
    lines = (f"  {status.value:<4} {meaning}" for status, meaning in MEANINGS.items())
    return "\n".join(("exit status:", *lines))
