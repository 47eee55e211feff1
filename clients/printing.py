"""Answers on a terminal or in a pipe: text goes to standard output, everything else to standard error.

Reasoning is dimmed on a terminal. It knows a client's answers and nothing of commands.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_triton.clients.api import Generation
from deepseek_triton.clients.printable import escape_json, shown

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class AnswerPrinter:
    """Prints one answer as it comes. Pieces of reasoning may come before the text or between pieces of it.

    On a terminal control characters are shown as escapes; in a pipe or a file the text is the model's own.
    """

    def __init__(self) -> None:
        self._is_in_reasoning = False

    def push(self, text: str, reasoning: str) -> None:
        """Print what is new."""
        if reasoning:
            dim = DIM if sys.stderr.isatty() and not self._is_in_reasoning else ""
            sys.stderr.write(dim + shown(reasoning, sys.stderr))
            sys.stderr.flush()
            self._is_in_reasoning = True
        if text:
            self._end_reasoning()
            print(shown(text, sys.stdout), end="", flush=True)

    def finish(self) -> None:
        """End the answer's last line."""
        self._end_reasoning()
        print(flush=True)

    def break_off(self) -> None:
        """Leave the answer as it is; on a terminal, what follows starts its own line."""
        if self._is_in_reasoning:
            self._end_reasoning()
        elif sys.stdout.isatty():
            print(flush=True)

    def _end_reasoning(self) -> None:
        if self._is_in_reasoning:
            print(PLAIN if sys.stderr.isatty() else "", file=sys.stderr, flush=True)
            self._is_in_reasoning = False


def log_prob_lines(answer: Generation) -> list[str]:
    """A line for each token: its log probability, and the likeliest tokens in its place."""
    lines = []
    for i, log_prob in enumerate(answer.log_probs):
        top = answer.top_log_probs[i] if i < len(answer.top_log_probs) else ()
        likeliest = ", ".join(f"{one.token!r} {one.log_prob:.4f}" for one in top)
        lines.append(f"token {i + 1}: {log_prob:.4f}" + (f" of {likeliest}" if likeliest else ""))
    return lines


def figures(answers: tuple[Generation, ...], total_s: float, first_s: float | None) -> str:
    """One line of token counts and times."""
    num_output_tokens = sum(answer.num_output_tokens for answer in answers)
    first = "" if first_s is None else f", time to first token {first_s:.2f} s"
    reasons = ", ".join(answer.finish_reason for answer in answers)
    return (
        f"{answers[0].num_input_tokens} tokens in, {num_output_tokens} out in {total_s:.2f} s "
        f"({num_output_tokens / total_s:.1f} tokens/s){first}, finish_reason {reasons}"
    )


def json_line(value: Any) -> str:
    """One line of JSON. Dataclasses become objects; numbers that JSON doesn't have (NaN, infinite) become null."""
    return escape_json(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
