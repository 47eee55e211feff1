"""`deepseek-triton build`: a checkpoint becomes a model repository."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from deepseek_triton.builders.commands.models import add_repository_argument
from deepseek_triton.builders.commands.progress import ProgressBar
from deepseek_triton.builders.commands.scoring_arguments import (
    SHARED_OPTIONS,
    add_scoring_arguments,
    read_scoring_options,
)
from deepseek_triton.builders.fp8.recipe import RECIPES
from deepseek_triton.builders.repository.options import TASKS, BuildOptions, precisions
from deepseek_triton.builders.repository.setting_options import add_setting_arguments, read_settings
from deepseek_triton.builders.targets import all_targets, target_named, target_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, in groups by what they are for."""
    parser.add_argument("checkpoint", type=Path, help="Hugging Face directory or .gguf file")
    parser.add_argument("--name", required=True, help="name of the served model")
    add_repository_argument(parser)
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
        help="tokens, prompt and answer (default: the model's own, as far as the caches of several sequences fit)",
    )
    parser.add_argument("--json", action="store_true", help="print the model, its version and the time as JSON")
    add_setting_arguments(parser.add_argument_group("engine settings"))
    _add_fp8_arguments(parser.add_argument_group("FP8"))
    _add_tensorrt_arguments(parser.add_argument_group("TensorRT"))
    add_scoring_arguments(parser.add_argument_group("task score"))


def _add_fp8_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe",
        default=BuildOptions.recipe,
        choices=sorted(RECIPES),
        help="which modules are quantised, and how (default: %(default)s)",
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


def run(arguments: argparse.Namespace) -> int:
    """Build, and tell what was made and what to do next."""
    from deepseek_triton.builders.repository.build import build

    start = time.monotonic()
    with ProgressBar(is_quiet=arguments.quiet) as bar:
        version = build(read_options(arguments), bar.report, bar.say)
    seconds = time.monotonic() - start
    path = arguments.repository / arguments.name
    if arguments.json:
        from deepseek_triton.clients.printing import json_line

        print(json_line({"model": arguments.name, "version": version, "path": path, "seconds": round(seconds, 1)}))
        return 0
    print(f"built {path}, version {version}")
    if not arguments.quiet:
        print(f"it took {_duration(seconds)}")
        print(f"serve it with: {shlex.join(['deepseek-triton', 'serve', str(arguments.repository)])}")
        print(f"a server that is running already must be restarted to serve version {version}")
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
        target=arguments.target,
        task=arguments.task,
        precision=arguments.precision or target_named(arguments.target).precisions[0],
        max_seq_len=arguments.max_seq_len,
        settings=read_settings(arguments, without=SHARED_OPTIONS if is_scoring else ()),
        recipe=arguments.recipe,
        keep=tuple(arguments.keep),
        calibration_text=arguments.calibration_text,
        ranges=arguments.ranges,
        compute_capability=arguments.compute_capability,
        timing_cache=arguments.timing_cache,
        scoring=read_scoring_options(arguments, without=() if is_scoring else SHARED_OPTIONS),
    )


def _duration(seconds: float) -> str:
    """3.2 s, 75 s, 5 min 20 s."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
