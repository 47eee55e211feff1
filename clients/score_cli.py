"""The command `score`: a text and labels in, each label's probability out.

Standard output gets the labels and nothing else; errors go to standard error. Exit status: 0; 1 for an error, told in
one line; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.cli import OK, add_connection_arguments, with_client
from deepseek_triton.clients.errors import ClientError
from deepseek_triton.clients.score import Score, ScoreRequest


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_score` reads."""
    parser.add_argument("model", help="name of the served scoring model")
    parser.add_argument("text", help="text to score; - scores each line of standard input but blank ones")
    parser.add_argument("--labels", metavar="A,B,…", help="labels to choose among (default: the model's own)")
    parser.add_argument("--json", action="store_true", help="print everything about each text, a JSON line each")
    add_connection_arguments(parser)


def run_score(args: argparse.Namespace) -> int:
    """Print each label and its probability, the likeliest first. Gives the exit status."""

    def run(client: BaseClient) -> int:
        labels = None if args.labels is None else [label.strip() for label in args.labels.split(",")]
        if args.text != "-":
            (score,) = client.score(ScoreRequest(texts=[args.text], labels=labels))
            print(_told(score, as_json=args.json, is_brief=False))
            return OK
        for number, line in enumerate(sys.stdin, start=1):
            if not line.strip():
                continue
            try:
                # A line each: an answer to one that doesn't wait for the next.
                (score,) = client.score(ScoreRequest(texts=[line.removesuffix("\n")], labels=labels))
            except (ClientError, ValueError) as error:
                raise type(error)(f"line {number}: {error}") from error
            print(_told(score, as_json=args.json, is_brief=True), flush=True)
        return OK

    return with_client(args, run)


def _told(score: Score, *, as_json: bool, is_brief: bool) -> str:
    if as_json:
        return json.dumps(asdict(score), ensure_ascii=False)
    ordered = sorted(score.probabilities.items(), key=lambda item: -item[1])
    return "\n".join(f"{label}\t{probability:.4f}" for label, probability in ordered[: 1 if is_brief else None])
