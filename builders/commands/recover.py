"""`deepseek-triton recover`: train a pruned checkpoint to answer as its parent does."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from deepseek_triton.builders.commands.interrupts import interruptible
from deepseek_triton.builders.commands.models import path
from deepseek_triton.builders.commands.progress import ProgressDisplay
from deepseek_triton.builders.lifecycle.recovery.options import (
    DEVICES,
    LEARNING_RATE,
    LORA_LEARNING_RATE,
    RecoverOptions,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("student", type=path, help="the pruned checkpoint: Hugging Face directory, or .gguf file")
    parser.add_argument("--teacher", type=path, required=True, metavar="PARENT", help="the checkpoint it was made from")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to train on")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write; must not exist")
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE", help="UTF-8 text to judge on (default: the end of --text)"
    )
    numbers = {
        "steps": "steps of the optimizer at most",
        "batch-size": "windows in a step",
        "micro-batch": "windows that are computed at once: fewer take less memory",
        "evaluate-every": "steps between judgements on held-out text",
        "patience": "judgements without a better one before it stops",
        "save-every": "steps between states that a killed run goes on from",
        "seed": "of the order of the windows and of LoRA's first weights",
    }
    for name, what in numbers.items():
        default = getattr(RecoverOptions, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--window", type=int, default=RecoverOptions.window_len, metavar="N",
        help="tokens in a window (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--learning-rate",
        type=float,
        metavar="R",
        help=f"highest learning rate (default: {LEARNING_RATE:g}, with LoRA {LORA_LEARNING_RATE:g})",
    )
    parser.add_argument(
        "--kl-weight",
        type=float,
        default=RecoverOptions.kl_weight,
        metavar="W",
        help="weight of the divergence from the teacher; the rest is the cross-entropy's (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=RecoverOptions.temperature,
        metavar="T",
        help="of both models' distributions in the divergence (default: %(default)s)",
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        metavar="R",
        help="train a LoRA adapter of this rank and merge it (default: all weights are trained)",
    )
    parser.add_argument(
        "--device", default=RecoverOptions.device, choices=DEVICES, help="where to train (default: %(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever an earlier run left")
    parser.add_argument("--json", action="store_true", help="print the judgements as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Train, and print what it changed."""
    from deepseek_triton.builders.checkpoint.files.hub import local_checkpoint
    from deepseek_triton.builders.lifecycle.recovery.recover import recover
    from deepseek_triton.builders.lifecycle.recovery.state import what_stays
    from deepseek_triton.builders.lifecycle.recovery.train import describe
    from deepseek_triton.clients.printing import json_line

    with interruptible(partial(what_stays, arguments.output)), ProgressDisplay(is_quiet=arguments.quiet) as bar:
        options = RecoverOptions(
            student=local_checkpoint(arguments.student, None, bar.report),
            teacher=local_checkpoint(arguments.teacher, None, bar.report),
            text=arguments.text,
            output=arguments.output,
            held_out=arguments.held_out,
            steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            batch_size=arguments.batch_size,
            micro_batch=arguments.micro_batch,
            window_len=arguments.window,
            kl_weight=arguments.kl_weight,
            temperature=arguments.temperature,
            lora_rank=arguments.lora_rank,
            evaluate_every=arguments.evaluate_every,
            patience=arguments.patience,
            save_every=arguments.save_every,
            seed=arguments.seed,
            device=arguments.device,
            restarts=arguments.restart,
        )
        recovered = recover(options, bar.report, bar.say)
    if arguments.json:
        steps = [asdict(judgement) for judgement in recovered.judgements]
        print(json_line({"output": recovered.output, "steps": recovered.num_steps, "judgements": steps}))
        return 0
    print(f"before:                  {describe(recovered.before)}")
    print(f"after {recovered.after.step:5} of {recovered.num_steps:5}:    {describe(recovered.after)}")
    print(f"wrote {recovered.output}")
    return 0
