"""The command `chat`: messages from a terminal or a pipe, each answered with the chat so far as context."""

from __future__ import annotations

import argparse
import sys

from deepseek_triton.clients.answer import AnswerStyle, print_answer
from deepseek_triton.clients.api import Client, Message
from deepseek_triton.clients.base import BaseClient
from deepseek_triton.clients.chat_commands import is_command, is_exit, run_command
from deepseek_triton.clients.chat_history import ChatHistory
from deepseek_triton.clients.cli import add_answer_arguments, add_model_argument, answer_style, explain, with_client
from deepseek_triton.clients.connect import ProtocolName
from deepseek_triton.clients.errors import ClientError, RequestRejected
from deepseek_triton.clients.line_input import LineInput
from deepseek_triton.clients.options import add_option, make_request
from deepseek_triton.clients.printable import printable
from deepseek_triton.clients.server.diagnosis import diagnose


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run_chat` reads."""
    add_model_argument(parser)
    add_answer_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the chat's first message, of the role system")
    add_option(parser, "enable_thinking", "answer without reasoning")


def run_chat(args: argparse.Namespace) -> int:
    """Answer each message of standard input. Returns the exit status.

    On a terminal Ctrl-C stops an answer or, at the prompt, ends the chat; an error ends only its answer. Without a
    terminal both end the chat, and every line is a message.
    """

    def run(client: BaseClient) -> int:
        _check_model(client)
        lines = LineInput()
        history = ChatHistory(args.system, _context_len(client))
        if lines.is_terminal and not args.quiet:
            _say(_banner(client, history.context_len))
        style = answer_style(args)
        while True:
            try:
                line = lines.read()
                if line is None or (lines.is_terminal and is_exit(line)):
                    return 0
                if lines.is_terminal and is_command(line):
                    _say(run_command(line, history))
                elif line.strip():
                    _answer(client, args, style, history, line)
            except (ClientError, ValueError) as error:
                if not lines.is_terminal:
                    raise
                _say(f"error: {explain(error)}")
            except _AnswerStopped:
                if not lines.is_terminal:
                    raise KeyboardInterrupt from None

    return with_client(args, run)


class _AnswerStopped(Exception):  # noqa: N818
    """Ctrl-C came while an answer was printed."""


def _answer(client: Client, args: argparse.Namespace, style: AnswerStyle, history: ChatHistory, line: str) -> None:
    """Print one answer. What came of it counts as the answer; if nothing came, the exchange never happened."""
    question = Message("user", line)
    written: list[str] = []
    try:
        while True:
            try:
                answer = print_answer(client, make_request(args, messages=history.messages(question)), style, written)
                break
            except RequestRejected as error:
                num_dropped = 0 if written else history.trim(str(error), question)
                if not num_dropped:
                    raise
                what = "question and its answer" if num_dropped == 1 else f"{num_dropped} questions and their answers"
                _say(f"the context of {history.context_len} tokens is full: it no longer holds the oldest {what}")
        if answer.finish_reason == "length" and args.max_tokens is None and not args.quiet:
            _say("the answer ends here because the context is full")
    except KeyboardInterrupt:
        raise _AnswerStopped from None
    finally:
        if text := "".join(written):
            history.add(question, text)


def _context_len(client: BaseClient) -> int | None:
    """The model's context in tokens; None if its engine doesn't tell: an earlier version built it."""
    try:
        return client.max_seq_len()
    except ClientError:
        return None


def _banner(client: BaseClient, context_len: int | None) -> str:
    context = "" if context_len is None else f", a context of {context_len:,} tokens"
    return f"{client.model} at {client.url}{context}; /help lists the commands, Ctrl-D ends the chat"


def _check_model(client: BaseClient) -> None:
    """Refuse a model that can't be talked to, before the first prompt."""
    protocol: ProtocolName = "http" if client.url.startswith("http") else "grpc"
    if reason := diagnose(protocol, client.url, client.model, "generate"):
        raise ClientError(reason)
    if not client.is_ready():
        raise ClientError(
            f"model {client.model!r} isn't ready at {client.url}: start the server, or check the model's name and --url"
        )


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
