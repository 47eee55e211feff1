"""The options of a request on the command line → a `GenerateRequest`.

Names, types and help come from the table of request options; the destination of an option is the request's field.
`GenerateRequest` checks the ranges.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from deepseek_triton.clients.request import GenerateRequest
from deepseek_triton.ensemble.protocol.request_options import (
    OPTIONS_BY_FIELD,
    REQUEST_OPTIONS,
    GuideType,
    RequestOption,
)
from deepseek_triton.ensemble.protocol.tensor_spec import DType

GUIDES: tuple[GuideType, ...] = ("json_schema", "regex", "choice")
KINDS: dict[DType, type] = {"INT32": int, "UINT64": int, "FP32": float, "STRING": str}
METAVARS: dict[DType, str] = {"INT32": "N", "UINT64": "N", "FP32": "X", "STRING": "TEXT"}
# Options of an argument group of their own, and of one command alone.
BESIDE_THE_TEXT = ("thinking_token_budget", "num_top_log_probs")
ONE_COMMANDS = ("enable_thinking", "num_return_sequences")


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that prompts and chats have in common."""
    answer = parser.add_argument_group("the answer", "where an option is absent, the server's default holds")
    for option in REQUEST_OPTIONS:
        if option.flag and option.field not in BESIDE_THE_TEXT + ONE_COMMANDS:
            add_option(answer, option.field)
    guide = parser.add_argument_group("its form, at most one of these").add_mutually_exclusive_group()
    guide.add_argument("--json-schema", type=Path, metavar="FILE", help="JSON that fits the schema in FILE")
    guide.add_argument("--regex", help="text that the expression matches as a whole")
    guide.add_argument(
        "--choice", action="append", metavar="TEXT", help="one of the texts, of which each has its own --choice"
    )
    more = parser.add_argument_group("beside the text, on standard error")
    for field in BESIDE_THE_TEXT:
        add_option(more, field)


def add_option(parser: argparse._ActionsContainer, field: str, text: str | None = None) -> None:
    """Add one request option; `text` None: its help is its meaning. A BOOL's flag switches it off."""
    option = OPTIONS_BY_FIELD[field]
    text = _help(option) if text is None else text
    if option.dtype == "BOOL":
        parser.add_argument(option.flag, action="store_false", default=None, dest=field, help=text)
        return
    kind, metavar = KINDS[option.dtype], METAVARS[option.dtype]
    action = "append" if option.is_list else "store"
    parser.add_argument(option.flag, action=action, type=kind, dest=field, metavar=metavar, help=text)


def _help(option: RequestOption) -> str:
    """The row's meaning as argparse writes help: without the full stop, with % escaped."""
    text = option.meaning[0].lower() + option.meaning[1:].removesuffix(".")
    more = "; may be given several times" if option.is_list else ""
    return (text + more).replace("`", "").replace("%", "%%")


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
