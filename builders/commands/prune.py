"""`deepseek-triton prune`: remove what matters least of a checkpoint, and write the rest as a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepseek_triton.builders.commands.interrupts import interruptible
from deepseek_triton.builders.commands.models import path
from deepseek_triton.builders.commands.progress import ProgressDisplay
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.pruning.options import (
    CHANNELS,
    DTYPES,
    EXPERTS,
    HEADS,
    LAYERS,
    METHODS,
    MULTIPLES,
    PruneOptions,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("checkpoint", type=path, help="Hugging Face directory or name, or .gguf file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write; must not exist")
    parser.add_argument(
        "--ratio",
        type=float,
        default=PruneOptions.ratio,
        metavar="R",
        help="share that is removed, between 0 and 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        default=PruneOptions.method,
        choices=METHODS,
        help="l1: the smallest weights; activation: what adds least on a text; depth: layers that change least; "
        "experts: of a mixture, those that add least, by the router's weight too (default: %(default)s)",
    )
    parser.add_argument(
        "--what",
        choices=(CHANNELS, HEADS, LAYERS, EXPERTS),
        help="channels of the MLPs, whole groups of heads that share a key head, or layers (default: the method's)",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to measure on (default: the built-in texts)"
    )
    multiples = ", ".join(f"{kind} {multiple}" for kind, multiple in MULTIPLES.items())
    parser.add_argument(
        "--multiple-of", type=int, metavar="N", help=f"what is left is a multiple of N (default: {multiples})"
    )
    parser.add_argument(
        "--refit",
        action="store_true",
        help="with method activation: fit what reads the removed channels anew; the text must resemble what is served",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights that are written (default: the checkpoint's)")
    parser.add_argument(
        "--evaluate", type=Path, metavar="FILE", help="UTF-8 text, another than --text, to measure what was lost on"
    )
    parser.add_argument(
        "--tokens", type=int, default=8176, metavar="N", help="tokens that --evaluate predicts (default: %(default)s)"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write --evaluate's pruning.md, .json and .png there"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prune, and print what is left."""
    from deepseek_triton.builders.checkpoint.files.hub import local_checkpoint
    from deepseek_triton.builders.fp8.texts.calibration_text import read_text
    from deepseek_triton.builders.lifecycle.pruning.prune import prune
    from deepseek_triton.builders.lifecycle.pruning.report import measure
    from deepseek_triton.clients.printing import json_line

    with interruptible(lambda: "nothing was written"), ProgressDisplay(is_quiet=arguments.quiet) as bar:
        options = PruneOptions(
            checkpoint=arguments.checkpoint,
            output=arguments.output,
            ratio=arguments.ratio,
            method=arguments.method,
            what=arguments.what,
            text=arguments.text,
            multiple_of=arguments.multiple_of,
            dtype=arguments.dtype,
            is_refitted=arguments.refit,
        ).at(local_checkpoint(arguments.checkpoint, None, bar.report))
        if arguments.report and not arguments.evaluate:
            raise BuildError("--report needs --evaluate FILE, the text to measure on")
        if arguments.evaluate:
            read_text(arguments.evaluate)  # before the minutes of pruning
        pruned = prune(options, bar.report, bar.say)
    report = None
    if arguments.evaluate:
        with interruptible(lambda: f"{options.output} stays"), ProgressDisplay(is_quiet=arguments.quiet) as bar:
            report = measure(
                options.checkpoint,
                {f"{100 * options.ratio:g} % {options.method}": options.output},
                arguments.evaluate,
                num_tokens=arguments.tokens,
                report=bar.report,
            )
        if arguments.report:
            report.save(arguments.report)
    if arguments.json:
        sizes = {"parameters": pruned.num_parameters, "parent_parameters": pruned.parent_parameters}
        print(json_line({"output": pruned.output, **sizes, **options.settings(), "report": report}))
        return 0
    print(
        f"wrote {pruned.output}: {pruned.num_parameters:,} of {pruned.parent_parameters:,} parameters, "
        f"{pruned.removed:.1%} fewer"
    )
    if report:
        print(report.table())
    if not arguments.quiet:
        print(f"next: deepseek-triton recover {pruned.output} --teacher {options.checkpoint} --text FILE")
    return 0
