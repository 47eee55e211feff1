"""One request → its answer on the terminal or in a pipe: text as it comes, figures, or JSON.

It knows clients and printing, and nothing of command lines.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass

from deepseek_triton.clients.api import Chunk, Client, GenerateRequest, Generation
from deepseek_triton.clients.errors import ClientError, RequestRejected
from deepseek_triton.clients.printing import AnswerPrinter, figures, json_line, log_prob_lines


@dataclass(frozen=True)
class AnswerStyle:
    """How answers are printed."""

    is_streamed: bool = True
    is_json: bool = False  # a JSON line for each answer, once it is whole
    has_figures: bool = False  # times and numbers of tokens, on standard error


def print_answer(client: Client, request: GenerateRequest, style: AnswerStyle, written: list[str]) -> Generation:
    """Print one answer and a newline; `written` collects the text, also of an answer that breaks off."""
    started = time.perf_counter()
    first_s: float | None = None
    chunks: list[Chunk] = []
    printer = AnswerPrinter()
    try:
        if style.is_json or not style.is_streamed:
            answer = client.generate(request)
            written.append(answer.text)
            if not style.is_json:
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
        if not style.is_json:
            printer.break_off()
        raise
    total_s = time.perf_counter() - started
    if not style.is_json:
        printer.finish()
    _print_details((answer,), style, total_s, first_s)
    return answer


def print_answers(client: Client, request: GenerateRequest, style: AnswerStyle) -> None:
    """Print several answers, each with a newline."""
    started = time.perf_counter()
    answers = client.generate_all(request)
    total_s = time.perf_counter() - started
    for number, answer in enumerate(answers, start=1):
        if style.is_json:
            continue
        print(f"answer {number} of {len(answers)}:", file=sys.stderr, flush=True)
        printer = AnswerPrinter()
        printer.push(answer.text, answer.reasoning)
        printer.finish()
    _print_details(answers, style, total_s, None)


def _print_details(answers: tuple[Generation, ...], style: AnswerStyle, total_s: float, first_s: float | None) -> None:
    """Print the JSON, or log probabilities and figures; errors last."""
    for answer in answers:
        if style.is_json:
            print(json_line({**asdict(answer), "total_s": round(total_s, 4)}), flush=True)
            continue
        for line in log_prob_lines(answer):
            print(line, file=sys.stderr)
    if style.has_figures:
        print(figures(answers, total_s, first_s), file=sys.stderr)
    if failed := [answer for answer in answers if answer.finish_reason == "error"]:
        raise RequestRejected(
            f"{len(failed)} of {len(answers)} answers broke off with an error; the server's log says why"
        )
