"""`deepseek-triton learn`: train a checkpoint on new data with LoRA, merge it, and write the result as a checkpoint."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

from deepseek_triton.builders.commands.interrupts import interruptible
from deepseek_triton.builders.commands.models import path
from deepseek_triton.builders.commands.progress import ProgressDisplay
from deepseek_triton.builders.lifecycle.learning.examples import ON_BAD
from deepseek_triton.builders.lifecycle.learning.options import DEVICES, LearnOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    lines = "JSON lines, each with text or with chat messages"
    parser.add_argument("checkpoint", type=path, help="Hugging Face directory or name, or .gguf file")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help=f"what to learn: {lines}")
    parser.add_argument(
        "--replay", type=Path, required=True, metavar="FILE", help=f"what the model must not forget: {lines}"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write; must not exist")
    parser.add_argument(
        "--bad-lines",
        default=LearnOptions.bad_lines,
        choices=ON_BAD,
        help="what becomes of lines that can't be used (default: %(default)s)",
    )
    numbers = {
        "epochs": "how often each new example is seen",
        "lora-rank": "rank of the adapter",
        "batch-size": "examples in a step",
        "micro-batch": "examples that are computed at once: fewer take less memory",
        "save-every": "steps between states that a killed run goes on from",
        "seed": "of the order of the examples and of LoRA's first weights",
    }
    for name, what in numbers.items():
        default = getattr(LearnOptions, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=LearnOptions.window_len, metavar="N",
        help="tokens of an example at most (default: %(default)s)",
    )  # fmt: skip
    shares = {
        "learning-rate": "highest learning rate",
        "replay-share": "share of each batch that is replayed",
        "held-out": "share of the lines that is kept for the gate",
    }
    for name, what in shares.items():
        default = getattr(LearnOptions, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="R", help=f"{what} (default: {default:g})"
        )
    parser.add_argument(
        "--device", default=LearnOptions.device, choices=DEVICES, help="where to train (default: %(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever an earlier run left")
    parser.add_argument("--json", action="store_true", help="print the losses as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Learn, and print what it changed."""
    from deepseek_triton.builders.checkpoint.files.hub import local_checkpoint
    from deepseek_triton.builders.lifecycle.learning.learn import CALIBRATION, learn
    from deepseek_triton.builders.lifecycle.recovery.state import what_stays
    from deepseek_triton.clients.printing import json_line

    with interruptible(partial(what_stays, arguments.output)), ProgressDisplay(is_quiet=arguments.quiet) as bar:
        options = LearnOptions(
            checkpoint=local_checkpoint(arguments.checkpoint, None, bar.report),
            data=arguments.data,
            replay=arguments.replay,
            output=arguments.output,
            replay_share=arguments.replay_share,
            held_out=arguments.held_out,
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            lora_rank=arguments.lora_rank,
            batch_size=arguments.batch_size,
            micro_batch=arguments.micro_batch,
            window_len=arguments.window,
            save_every=arguments.save_every,
            seed=arguments.seed,
            device=arguments.device,
            bad_lines=arguments.bad_lines,
            restarts=arguments.restart,
        )
        learnt = learn(options, bar.report, bar.say)
    if arguments.json:
        print(json_line(asdict(learnt)))
        return 0
    print(f"learnt from {learnt.num_new} examples in {learnt.steps} steps, {learnt.num_replay} replayed")
    for what, before, after in (
        ("new", learnt.before.new, learnt.after.new),
        ("old", learnt.before.old, learnt.after.old),
    ):
        perplexities = f"{math.exp(min(before, 700)):.3f} before, {math.exp(min(after, 700)):.3f} after"
        print(f"held-out {what} data: perplexity {perplexities}")
    print(f"wrote {learnt.output}")
    if not arguments.quiet:
        print(f"next: deepseek-triton gate {learnt.output} --name MODEL --repository DIR --limits limits.json …")
        print(f"a build in FP8 calibrates on it with --calibration-text {learnt.output / CALIBRATION}")
    return 0
