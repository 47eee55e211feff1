"""The commands `generate` and `chat`: arguments and a terminal in, a client's answers out.

They know argparse, streams and signals, and nothing of transports: `clients.connect` gives the client.
Standard output gets the model's text and nothing else; reasoning, errors, figures and prompts go to standard error.

Exit status: 0; 1 for an error, told in one line; 130 when interrupted. An answer that is given up is stopped
on the server too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing

from deepseek_triton.clients.api import DEFAULT_TIMEOUT_S, Chunk, Client, GenerateRequest, Generation, Message
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.connect import DEFAULT_URLS, PROTOCOLS, connect
from deepseek_triton.clients.errors import (
    ClientError,
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerUnavailable,
)
from deepseek_triton.clients.options import add_request_arguments, make_request
from deepseek_triton.clients.printing import AnswerPrinter, figures, log_prob_lines

OK, ERROR, INTERRUPTED = 0, 1, 130

# What to do next, for each kind of error.
_HINTS: dict[type[ClientError], str] = {
    ServerUnavailable: "start the server, or name its address with --url",
    RequestTimeout: "allow more with --timeout, or ask for less with --max-tokens",
    RequestRejected: "check the model's name and the options, or the server's log",
    ProtocolError: "check that --url and --protocol name a Triton that serves this project's models",
}


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_generate` reads."""
    parser.add_argument("model", help="name of the served model")
    parser.add_argument("prompt", help="text to continue, as it is; - reads it from standard input")
    _add_common_arguments(parser)
    parser.add_argument(
        "--n",
        type=int,
        dest="num_return_sequences",
        metavar="N",
        help="answers to the one prompt; more than one come as a whole, each behind a line on standard error",
    )


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_chat` reads."""
    parser.add_argument("model", help="name of the served model")
    _add_common_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the chat's first message, of the role system")
    parser.add_argument(
        "--no-thinking", action="store_false", default=None, dest="enable_thinking", help="answer without reasoning"
    )


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `with_client` reads."""
    urls = ", ".join(f"{url} for {protocol}" for protocol, url in DEFAULT_URLS.items())
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="default: %(default)s")
    parser.add_argument("--url", help=f"the server's address (default: {urls})")
    parser.add_argument(
        "--timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="longest time for a whole answer (default: %(default)g)",
    )


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    add_connection_arguments(parser)
    parser.add_argument("--no-stream", action="store_true", help="wait for the whole answer")
    parser.add_argument("--verbose", action="store_true", help="print times to standard error")
    add_request_arguments(parser)


def run_generate(args: argparse.Namespace) -> int:
    """Print the continuation of one prompt and a newline. Gives the exit status."""

    def run(client: Client) -> int:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        request = make_request(args, prompt=prompt)
        if request.num_sequences > 1:
            _answer_all(client, request, args)
        else:
            _answer(client, request, args, [])
        return OK

    return with_client(args, run)


def run_chat(args: argparse.Namespace) -> int:
    """Answer each line of standard input, with the chat so far as context. Gives the exit status.

    On a terminal Ctrl-C stops an answer or, at the prompt, ends the chat; an error ends only its answer.
    Without a terminal both end the chat.
    """

    def run(client: Client) -> int:
        if not client.is_ready():
            url = args.url or DEFAULT_URLS[args.protocol]
            raise ClientError(
                f"model {args.model!r} isn't ready at {url}: start the server, or check the model's name and --url"
            )
        is_terminal = sys.stdin.isatty()
        history = [] if args.system is None else [Message("system", args.system)]
        while (line := _read_line(is_terminal)) is not None:
            if not line.strip():
                continue
            turn = Message("user", line)
            written: list[str] = []
            try:
                _answer(client, make_request(args, messages=(*history, turn)), args, written)
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
            except ClientError as error:
                if not is_terminal:
                    raise
                _print_error(error)
            # What came so far counts as the answer; if nothing came, the turn never happened.
            if text := "".join(written):
                history += [turn, Message("assistant", text)]
        return OK

    return with_client(args, run)


def with_client(args: argparse.Namespace, run: Callable[[BaseClient], int]) -> int:
    """Run a command; every way in which it may end becomes an exit status here."""
    try:
        with connect(args.protocol, args.model, args.url, args.timeout) as client:
            return run(client)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left, `| head` say. Nobody is there to be told; the interpreter's
        # own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install 'deepseek-triton[client]'", file=sys.stderr)
        return ERROR
    except (ClientError, ValueError) as error:
        _print_error(error)
        return ERROR


def _answer(client: Client, request: GenerateRequest, args: argparse.Namespace, written: list[str]) -> None:
    """Print one answer and a newline; `written` collects the text, also of an answer that breaks off."""
    started = time.perf_counter()
    first_s: float | None = None
    chunks: list[Chunk] = []
    printer = AnswerPrinter()
    try:
        if args.no_stream:
            answer = client.generate(request)
            written.append(answer.text)
            printer.push(answer.text, answer.reasoning)
        else:
            with closing(client.stream(request)) as stream:
                for chunk in stream:
                    first_s = first_s or time.perf_counter() - started
                    chunks.append(chunk)
                    written.append(chunk.text)
                    printer.push(chunk.text, chunk.reasoning)
            answer = Generation.from_chunks(chunks)
    except (ClientError, KeyboardInterrupt):
        printer.break_off()
        raise
    total_s = time.perf_counter() - started
    printer.finish()
    _tell_details((answer,), args, total_s, first_s)


def _answer_all(client: Client, request: GenerateRequest, args: argparse.Namespace) -> None:
    """Print several answers, each with a newline."""
    started = time.perf_counter()
    answers = client.generate_all(request)
    total_s = time.perf_counter() - started
    for number, answer in enumerate(answers, start=1):
        print(f"answer {number} of {len(answers)}:", file=sys.stderr, flush=True)
        printer = AnswerPrinter()
        printer.push(answer.text, answer.reasoning)
        printer.finish()
    _tell_details(answers, args, total_s, None)


def _tell_details(
    answers: tuple[Generation, ...], args: argparse.Namespace, total_s: float, first_s: float | None
) -> None:
    """Print what else there is to say, errors last."""
    for answer in answers:
        for line in log_prob_lines(answer):
            print(line, file=sys.stderr)
    if args.verbose or sys.stderr.isatty():
        print(figures(answers, total_s, first_s), file=sys.stderr)
    if failed := [answer for answer in answers if answer.finish_reason == "error"]:
        raise RequestRejected(f"{len(failed)} of {len(answers)} answers broke off with an error")


def _read_line(is_terminal: bool) -> str | None:
    """Read one line, with a prompt on a terminal; None at the end of input."""
    if not is_terminal:
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    try:
        # input() edits lines on a terminal; its prompt must not get into output that goes elsewhere.
        if sys.stdout.isatty():
            return input("> ")
        print("> ", end="", flush=True, file=sys.stderr)
        return input()
    except EOFError:
        print(file=sys.stderr)
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise


def _print_error(error: Exception) -> None:
    hint = next((hint for kind, hint in _HINTS.items() if isinstance(error, kind)), None)
    text = " ".join(str(error).split())
    print(f"error: {text}" + (f"; {hint}" if hint else ""), file=sys.stderr)
