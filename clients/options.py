"""The options of a request on the command line → a `GenerateRequest`.

An option's destination is the request's field, so that it is named once. Which of them a command has is said here;
ranges are the request's business.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from deepseek_triton.clients.request import GenerateRequest, GuideType

NUMBERS = (
    ("max-tokens", int),
    ("temperature", float),
    ("top-k", int),
    ("top-p", float),
    ("min-p", float),
    ("repetition-penalty", float),
    ("presence-penalty", float),
    ("frequency-penalty", float),
    ("seed", int),
)
GUIDES: tuple[GuideType, ...] = ("json_schema", "regex", "choice")


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that prompts and chats have in common."""
    sampling = parser.add_argument_group("the answer", "where an option is absent, the server's default holds")
    for option, kind in NUMBERS:
        sampling.add_argument(f"--{option}", type=kind, metavar="N" if kind is int else "X")
    sampling.add_argument(
        "--stop",
        action="append",
        dest="stop_words",
        metavar="TEXT",
        help="ends the answer, and is no part of it; may be given several times",
    )
    guide = parser.add_argument_group("its form, at most one of these").add_mutually_exclusive_group()
    guide.add_argument("--json-schema", type=Path, metavar="FILE", help="JSON that fits the schema in FILE")
    guide.add_argument("--regex", help="text that the expression matches as a whole")
    guide.add_argument(
        "--choice", action="append", metavar="TEXT", help="one of the texts, of which each has its own --choice"
    )
    more = parser.add_argument_group("beside the text, on standard error")
    more.add_argument(
        "--thinking-budget",
        type=int,
        dest="thinking_token_budget",
        metavar="TOKENS",
        help="longest reasoning; what a model thinks is printed dimmed on a terminal, and never to standard output",
    )
    more.add_argument(
        "--log-probs",
        type=int,
        dest="num_top_log_probs",
        metavar="N",
        help="print each token's log probability, and the N likeliest tokens in its place",
    )


def make_request(args: argparse.Namespace, **given: Any) -> GenerateRequest:
    """The request that the options ask for; `given` are fields that aren't options."""
    options = {field.name: getattr(args, field.name, None) for field in fields(GenerateRequest)}
    return GenerateRequest(**{**options, **_guide(args), **given})


def _guide(args: argparse.Namespace) -> dict[str, Any]:
    for guide_type in GUIDES:
        value = getattr(args, guide_type)
        if value is not None:
            return {"guide_type": guide_type, "guide": _read(value) if isinstance(value, Path) else value}
    return {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ValueError(f"json-schema must name a file that can be read, got {str(path)!r}: {reason}") from None
