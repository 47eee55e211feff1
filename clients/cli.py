"""The command `generate`, and what the commands of clients have in common: how a server is named, how errors are told.

It knows argparse and streams, and nothing of transports: `clients.connect` gives the client. Standard output gets the
model's text and nothing else; reasoning, errors and figures go to standard error. An answer that is given up is stopped
on the server too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable

from deepseek_triton.clients.address import read_address
from deepseek_triton.clients.answer import AnswerStyle, print_answer, print_answers
from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S, Client
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.connect import DEFAULT_URLS, PROTOCOLS, connect
from deepseek_triton.clients.errors import (
    ClientError,
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerOverloaded,
    ServerUnavailable,
)
from deepseek_triton.clients.line_input import read_everything
from deepseek_triton.clients.options import add_option, add_request_arguments, make_request
from deepseek_triton.clients.server.diagnosis import Task, diagnose
from deepseek_triton.interrupts import interrupts_end

URL_VARIABLE = "DEEPSEEK_TRITON_URL"
MODEL_VARIABLE = "DEEPSEEK_TRITON_MODEL"

# What to do next, for each kind of error.
_HINTS: dict[type[ClientError], str] = {
    ServerUnavailable: "start the server, or check --url and --protocol (by default gRPC has port 8001, HTTP 8000)",
    RequestTimeout: "allow more with --timeout, or ask for less with --max-tokens",
    ProtocolError: "check that --url and --protocol name a Triton that serves this project's models",
}

# What Triton puts before a model's own message.
_TRITONS_PREFIX = re.compile(r"\[request id: [^\]]*\] |in ensemble '[^']*', ")
# Words of errors that are the server's fault, not the request's.
_BROKEN = re.compile(r"stub process|internal|unexpected error|shared memory|can't be taken in", re.IGNORECASE)


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_generate` reads."""
    add_model_argument(parser)
    parser.add_argument("prompt", help="text to continue, as it is; - reads it from standard input")
    add_answer_arguments(parser)
    text = "answers to the one prompt; more than one come as a whole, each after a line on standard error"
    add_option(parser, "num_return_sequences", text)


def add_model_argument(parser: argparse.ArgumentParser, what: str = "served model") -> None:
    """Add the model's name, which may be left out where the environment has it."""
    default = os.environ.get(MODEL_VARIABLE)
    parser.add_argument(
        "model",
        nargs="?" if default else None,
        default=default,
        help=f"name of the {what} (may be left out where {MODEL_VARIABLE} is set)",
    )


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `with_client` reads beside the model."""
    urls = ", ".join(f"{url} for {protocol}" for protocol, url in DEFAULT_URLS.items())
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url",
        default=os.environ.get(URL_VARIABLE) or None,
        help=f"host:port, grpc://host:port or http://host:port (default: {URL_VARIABLE}, else {urls})",
    )
    server.add_argument("--protocol", choices=PROTOCOLS, help="default: what the URL begins with, else grpc")
    server.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="longest time for a whole answer (default: %(default)g)",
    )


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `make_request` and `answer_style` read, and the connection."""
    add_connection_arguments(parser)
    parser.add_argument("--no-stream", action="store_true", help="wait for the whole answer")
    parser.add_argument("--json", action="store_true", help="print everything about an answer as one line of JSON")
    add_request_arguments(parser)


def answer_style(args: argparse.Namespace) -> AnswerStyle:
    """How the options ask for answers to be printed: on a terminal with figures, unless -q."""
    has_figures = args.verbose or (sys.stderr.isatty() and not args.quiet)
    return AnswerStyle(is_streamed=not args.no_stream, is_json=args.json, has_figures=has_figures)


def run_generate(args: argparse.Namespace) -> int:
    """Print the continuation of one prompt and a newline. Returns the exit status."""

    def run(client: Client) -> int:
        prompt = read_everything() if args.prompt == "-" else args.prompt
        request = make_request(args, prompt=prompt)
        if request.num_sequences > 1:
            print_answers(client, request, answer_style(args))
        else:
            print_answer(client, request, answer_style(args), [])
        return 0

    with interrupts_end():
        return with_client(args, run)


def with_client(args: argparse.Namespace, run: Callable[[BaseClient], int], task: Task = "generate") -> int:
    """Connect and run a command; `task` is what it asks of the model.

    Raises:
        ClientError: whatever went wrong, as one line that says what to do.
    """
    try:
        protocol, url = read_address(args.url, args.protocol)
        with connect(protocol, args.model, url, args.timeout) as client:
            return run(client)
    except (RequestRejected, ServerUnavailable, ProtocolError) as error:
        is_full = isinstance(error, ServerOverloaded)
        reason = None if is_full else diagnose(protocol, url, args.model, task)
        raise ClientError(reason or explain(error)) from error
    except (ClientError, ValueError) as error:
        raise ClientError(explain(error)) from error


def explain(error: Exception) -> str:
    """The error on one line, with what to do next unless the server's own words say it."""
    text = " ".join(str(error).split())
    if isinstance(error, RequestRejected):
        text = _TRITONS_PREFIX.sub("", text)
        return f"{text}; the server's log says more" if _BROKEN.search(text) else text
    hint = next((hint for kind, hint in _HINTS.items() if isinstance(error, kind)), None)
    return f"{text}; {hint}" if hint else text
