"""`deepseek-triton build`: a checkpoint becomes a model repository."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from deepseek_triton.builders.commands.interrupts import interruptible
from deepseek_triton.builders.commands.models import add_memory_argument, add_repository_argument, path
from deepseek_triton.builders.commands.progress import ProgressDisplay
from deepseek_triton.builders.commands.scoring_arguments import (
    SHARED_OPTIONS,
    add_scoring_arguments,
    read_scoring_options,
)
from deepseek_triton.builders.fp8.recipe import RECIPES
from deepseek_triton.builders.repository.options import TASKS, BuildOptions, precisions
from deepseek_triton.builders.repository.setting_options import add_setting_arguments, given_values, read_settings
from deepseek_triton.builders.targets import all_targets, target_named, target_names
from deepseek_triton.ensemble.protocol.text_settings import TextSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, in groups by what they are for."""
    parser.add_argument("checkpoint", type=path, help="Hugging Face directory, .gguf file, or ORG/NAME")
    parser.add_argument("--name", required=True, help="name of the served model")
    add_repository_argument(parser)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of ORG/NAME (default: main)")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="LoRA adapter, as peft saves it, to merge into the weights"
    )
    parser.add_argument(
        "--target",
        default=BuildOptions.target,
        choices=target_names(),
        help="what runs the model (default: %(default)s)",
    )
    parser.add_argument(
        "--task",
        default=BuildOptions.task,
        choices=TASKS,
        help="generate: stream text; score: choose among labels (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=precisions(),
        help=f"of the weights (default: {', '.join(f'{t.precisions[0]} for {t.name}' for t in all_targets())})",
    )
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="tokens of prompt and answer, at least 2 (default: the model's own, as far as several caches fit)",
    )
    parser.add_argument(
        "--infer", action="store_true", help="also build NAME-infer, which answers KServe's infer with one response"
    )
    add_memory_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the model, its version and the time as JSON")
    settings = parser.add_argument_group(
        "engine settings", "What isn't given is kept from the model's last build, else it has its default."
    )
    settings.add_argument("--reset-settings", action="store_true", help="keep no setting from the model's last build")
    add_setting_arguments(settings)
    _add_fp8_arguments(parser.add_argument_group("FP8"))
    _add_tensorrt_arguments(parser.add_argument_group("TensorRT"))
    add_scoring_arguments(parser.add_argument_group("task score"))


def _add_fp8_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        help="which modules are quantised, and how (default: default, or fast where that takes longer than the budget)",
    )
    group.add_argument(
        "--budget",
        type=float,
        default=BuildOptions.budget,
        metavar="MINUTES",
        help="within which the build should end, without --recipe, above 0 (default: %(default)g)",
    )
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="modules that are not quantised; may be given several times",
    )
    group.add_argument(
        "--calibration-text", type=Path, metavar="FILE", help="text file (default: a built-in set, and the model's own)"
    )
    group.add_argument(
        "--ranges", type=Path, metavar="FILE", help="activation ranges: read where the file exists, else written"
    )


def _add_tensorrt_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--compute-capability", metavar="X.Y", help="of the GPU that will serve, as 8.9 (default: this machine's)"
    )
    group.add_argument("--timing-cache", type=Path, metavar="FILE", help="TensorRT's timings, kept from build to build")
    group.add_argument(
        "--builder-optimization-level",
        type=int,
        metavar="N",
        help="how long TensorRT searches for kernels, 0 to 5 (default: its own, 3); TensorRT for RTX times none",
    )


def run(arguments: argparse.Namespace) -> int:
    """Build, and tell what was made and what to do next."""
    from deepseek_triton.builders.commands.serving_now import served_at_default

    start = time.monotonic()
    options = read_options(arguments)
    with interruptible(lambda: _what_stays(options)), ProgressDisplay(is_quiet=arguments.quiet) as bar:
        from deepseek_triton.builders.repository.build import build  # which takes a second

        version = build(options, bar.report, bar.say)
    seconds = time.monotonic() - start
    built = arguments.repository / arguments.name
    if arguments.json:
        from deepseek_triton.clients.printing import json_line

        print(json_line({"model": arguments.name, "version": version, "path": built, "seconds": round(seconds, 1)}))
        return 0
    print(f"built {built}, version {version}")
    if not arguments.quiet:
        print(f"it took {_duration(seconds)}")
        print(f"serve it with: {shlex.join(['deepseek-triton', 'serve', str(arguments.repository)])}")
        print(f"a server that is running already must be restarted to serve version {version}")
        if served := served_at_default(arguments.repository, arguments.name):
            address, number = served
            print(f"the server at {address} answers with version {number} of {arguments.name} until then")
    return 0


def read_options(arguments: argparse.Namespace) -> BuildOptions:
    """What was asked for.

    Raises:
        BuildError: an option is at fault.
    """
    # Both kinds of model have a queue: the one option that they share belongs to the one that is built.
    is_scoring = arguments.task == "score"
    return BuildOptions(
        checkpoint=arguments.checkpoint,
        name=arguments.name,
        repository=arguments.repository,
        adapter=arguments.adapter,
        revision=arguments.revision,
        target=arguments.target,
        task=arguments.task,
        precision=arguments.precision or target_named(arguments.target).precisions[0],
        max_seq_len=arguments.max_seq_len,
        settings=read_settings(arguments, without=SHARED_OPTIONS if is_scoring else ()),
        infer=arguments.infer,
        instances=given_values(arguments, TextSettings.table().values()),
        reset_settings=arguments.reset_settings,
        recipe=arguments.recipe,
        budget=arguments.budget,
        keep=tuple(arguments.keep),
        calibration_text=arguments.calibration_text,
        ranges=arguments.ranges,
        compute_capability=arguments.compute_capability,
        timing_cache=arguments.timing_cache,
        builder_optimization_level=arguments.builder_optimization_level,
        memory=arguments.memory,
        scoring=read_scoring_options(arguments, without=() if is_scoring else SHARED_OPTIONS),
    )


def _what_stays(options: BuildOptions) -> str:
    """What an interrupted build leaves, and how to go on."""
    from deepseek_triton.builders.fp8.journal import journal_directory

    journal = journal_directory(options.repository, options.name)
    if journal.is_dir():
        return f"{options.repository} is as it was; the same command goes on from what is done, which {journal} keeps"
    return f"{options.repository} is as it was; the same command builds from the beginning"


def _duration(seconds: float) -> str:
    """3.2 s, 75 s, 5 min 20 s."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
