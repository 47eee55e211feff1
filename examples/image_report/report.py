"""Findings → the prompt and the JSON schema of a report; and what a report says.

The schema of each request holds the findings as constants, so every complete report states exactly them. The impression
is one of the sentences that `impressions` makes of the findings: the model chooses the wording, never what it says. For
a larger text model it may be free text, which is not checked.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deepseek_triton.examples.image_report.findings import Finding, Status

NOTICE = "Not a medical device."
FREE_IMPRESSION = "^[A-Z][A-Za-z ,]{20,160}\\.$"  # one sentence
Impression = Literal["chosen", "free"]
IMPRESSIONS: tuple[Impression, ...] = ("chosen", "free")
STATED = re.compile(r"(present|absent|uncertain) ([01]\.\d\d)")  # what a report says of a finding
# Ways to say which findings are there, and which may be.
PRESENT = ("The tile shows {}", "The classifier found {}", "Present: {}")
UNCERTAIN = ("{} cannot be ruled out", "uncertain: {}")
NOTHING = ("The tile shows none of the findings", "The classifier found nothing")
SYSTEM = "You sum up the findings of a classifier in one sentence."
# What a small model follows better than a description of what is wanted.
EXAMPLE = (
    "necrosis is absent (3%)\ninflammation is present (96%)\npleomorphism is uncertain (55%)",
    "The tile shows inflammation; pleomorphism cannot be ruled out.",
)
# Guided decoding's own options: no spaces, which would be tokens to generate.
COMPACT = {"whitespace_pattern": "", "item_separator": ",", "key_separator": ":"}


class ReportError(ValueError):
    """The text is no report; the message says why."""


@dataclass(frozen=True)
class ImageReport:
    """What a report says."""

    notice: str
    findings: tuple[Finding, ...]
    impression: str


def messages(findings: Sequence[Finding]) -> str:
    """The chat, as JSON, that asks for a report."""
    lines = (f"{one.name.replace('_', ' ')} is {one.status} ({one.probability * 100:.0f}%)" for one in findings)
    turns = (("system", SYSTEM), ("user", EXAMPLE[0]), ("assistant", EXAMPLE[1]), ("user", "\n".join(lines)))
    return json.dumps([{"role": role, "content": text} for role, text in turns])


def impressions(findings: Sequence[Finding]) -> tuple[str, ...]:
    """The sentences that sum up these findings, each exactly: what is present, then what is uncertain."""
    present, uncertain = (_listed(findings, status) for status in ("present", "uncertain"))
    if not present and not uncertain:
        return tuple(f"{one}." for one in NOTHING)
    if not present:
        return tuple(f"{one.format(uncertain).capitalize()}." for one in UNCERTAIN)
    first = [one.format(present) for one in PRESENT]
    if not uncertain:
        return tuple(f"{one}." for one in first)
    return tuple(f"{one}; {other.format(uncertain)}." for one, other in itertools.product(first, UNCERTAIN))


def schema(findings: Sequence[Finding], impression: Impression = "chosen") -> str:
    """The JSON schema of the report on these findings. impression: one of `impressions`, or free text."""
    said: dict[str, Any] = {"enum": list(impressions(findings))}
    if impression == "free":
        said = {"type": "string", "pattern": FREE_IMPRESSION}
    stated = {one.name: {"const": f"{one.status} {one.probability:.2f}"} for one in findings}
    report = _object({"findings": _object(stated), "impression": said, "notice": {"const": NOTICE}})
    return json.dumps({**report, "x-guidance": COMPACT})


def read_report(text: str) -> ImageReport:
    """Read what the model wrote. Raises `ReportError`."""
    try:
        fields = json.loads(text)
        findings = tuple(_finding(name, stated) for name, stated in fields["findings"].items())
        return ImageReport(str(fields["notice"]), findings, str(fields["impression"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"the text is no report: {error!r}") from error


def _finding(name: str, stated: str) -> Finding:
    match = STATED.fullmatch(stated)
    if match is None:
        raise ValueError(f"{name} is {stated!r}")
    return Finding(name, match[1], float(match[2]))  # type: ignore[arg-type]


def _listed(findings: Sequence[Finding], status: Status) -> str:
    """The findings of one status: "a", "a and b", "a, b and c"; "": there is none."""
    *others, last = [one.name.replace("_", " ") for one in findings if one.status == status] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
