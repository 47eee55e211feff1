"""`deepseek-triton evaluate`: what FP8 costs in quality, measured against the float checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepseek_triton.builders.commands.interrupts import interruptible
from deepseek_triton.builders.commands.models import path
from deepseek_triton.builders.commands.progress import ProgressDisplay
from deepseek_triton.builders.fp8.recipe import RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("checkpoint", type=path, help="Hugging Face directory or .gguf file: the float reference")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to predict")
    parser.add_argument(
        "--artefact", type=Path, metavar="PATH", help="model.onnx, or the directory it is in (default: quantise now)"
    )
    parser.add_argument(
        "--recipe", default="default", choices=sorted(RECIPES), help="how to quantise (default: %(default)s)"
    )
    parser.add_argument(
        "--ranges", type=Path, metavar="FILE", help="activation ranges: read where the file exists, else written"
    )
    parser.add_argument(
        "--tokens", type=int, default=8176, metavar="N", help="tokens to predict (default: %(default)s)"
    )
    parser.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens in a window (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory for quality.json and quality.png")
    parser.add_argument("--json", action="store_true", help="print what quality.json holds instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and write the files."""
    from deepseek_triton.builders.checkpoint.files.hub import local_checkpoint
    from deepseek_triton.builders.fp8.quality.quality_report import EvaluateOptions, evaluate
    from deepseek_triton.builders.fp8.recipe import recipe_named
    from deepseek_triton.clients.printing import json_line

    with interruptible(lambda: "nothing was written"), ProgressDisplay(is_quiet=arguments.quiet) as bar:
        options = EvaluateOptions(
            checkpoint=local_checkpoint(arguments.checkpoint, None, bar.report),
            text=arguments.text,
            artefact=arguments.artefact,
            recipe=recipe_named(arguments.recipe),
            ranges=arguments.ranges,
            num_tokens=arguments.tokens,
            window_len=arguments.window,
        )
        result = evaluate(options, bar.report)
    print(json_line(result) if arguments.json else result.table())
    if arguments.output:
        result.save(arguments.output)
        if not arguments.json:
            print(f"wrote {arguments.output / 'quality.json'} and {arguments.output / 'quality.png'}")
    return 0
