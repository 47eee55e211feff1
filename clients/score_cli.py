"""The command `score`: a text and labels in, each label's probability out.

Standard output gets the labels and nothing else.
"""

from __future__ import annotations

import argparse
import sys

from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.cli import add_connection_arguments, add_model_argument, with_client
from deepseek_triton.clients.errors import ClientError
from deepseek_triton.clients.line_input import read_lines
from deepseek_triton.clients.printable import shown
from deepseek_triton.clients.printing import json_line
from deepseek_triton.clients.score import Score, ScoreRequest
from deepseek_triton.interrupts import interrupts_end


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_score` reads."""
    add_model_argument(parser, "served scoring model")
    parser.add_argument("text", help="text to score; - scores each line of standard input but blank ones")
    parser.add_argument("--labels", metavar="A,B,…", help="labels to choose among (default: the model's own)")
    parser.add_argument("--json", action="store_true", help="print everything about each text as one line of JSON")
    add_connection_arguments(parser)


def run_score(args: argparse.Namespace) -> int:
    """Print each label and its probability, the likeliest first. Returns the exit status."""

    def run(client: BaseClient) -> int:
        labels = None if args.labels is None else [label.strip() for label in args.labels.split(",")]
        if args.text != "-":
            (score,) = client.score(ScoreRequest(texts=[args.text], labels=labels))
            print(shown(_describe(score, as_json=args.json, is_brief=False), sys.stdout))
            return 0
        for number, line in enumerate(read_lines(), start=1):
            if not line.strip():
                continue
            try:
                # One line in a request: its answer doesn't wait for the next line.
                (score,) = client.score(ScoreRequest(texts=[line], labels=labels))
            except (ClientError, ValueError) as error:
                raise type(error)(f"line {number}: {error}") from error
            print(shown(_describe(score, as_json=args.json, is_brief=True), sys.stdout), flush=True)
        return 0

    with interrupts_end():
        return with_client(args, run, "score")


def _describe(score: Score, *, as_json: bool, is_brief: bool) -> str:
    if as_json:
        return json_line(score)
    ordered = sorted(score.probabilities.items(), key=lambda item: -item[1])
    return "\n".join(f"{label}\t{probability:.4f}" for label, probability in ordered[: 1 if is_brief else None])
