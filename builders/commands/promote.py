"""`deepseek-triton promote`: let a candidate that passed the gate answer a name, share by share, watched."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from deepseek_triton.builders.commands.interrupts import interruptible
from deepseek_triton.builders.commands.models import add_repository_argument, path
from deepseek_triton.builders.commands.progress import ProgressDisplay
from deepseek_triton.builders.lifecycle.promotion.arm_figures import CanaryBounds
from deepseek_triton.builders.lifecycle.promotion.options import BY, PromoteOptions
from deepseek_triton.builders.repository.options import BuildOptions

ROLLED_BACK = 3  # exit status; 1 is an error's
SERVER = "http://localhost:8000"


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `promote` and `rollback` share."""
    add_repository_argument(parser)
    parser.add_argument(
        "--routes", type=Path, required=True, metavar="FILE", help="route file of the gateway and of `serve --routes`"
    )
    parser.add_argument(
        "--server", default=SERVER, metavar="URL",
        help="tritonserver's HTTP address; the environment's TRITON_ADMIN_KEY is sent (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the promotion as JSON")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("name", help="name that clients ask the gateway for")
    parser.add_argument("candidate", type=path, help="checkpoint that the gate judged")
    parser.add_argument("--report", type=Path, required=True, metavar="DIR", help="the gate's report of the candidate")
    parser.add_argument(
        "--gateway", action="append", required=True, metavar="URL",
        help="gateway whose metrics are watched; may be given several times",
    )  # fmt: skip
    add_server_arguments(parser)
    parser.add_argument(
        "--shares", default=",".join(f"{share:g}" for share in PromoteOptions.shares), metavar="P,P,…",
        help="percent of callers that the candidate gets, one after the other (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--by", default=PromoteOptions.by, choices=BY,
        help="what is dealt: caller keeps each key on one model, request doesn't (default: %(default)s)",
    )  # fmt: skip
    numbers = {
        "stage-s": "least seconds of each share",
        "max-stage-s": "seconds after which a share with too few requests is rolled back",
        "drain-s": "seconds that requests on the old model may still take",
    }
    for name, what in numbers.items():
        default = getattr(PromoteOptions, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="S", help=f"{what} (default: {default:g})"
        )
    parser.add_argument(
        "--min-requests", type=int, default=CanaryBounds.min_requests, metavar="N",
        help="requests of the candidate before a share is raised (default: %(default)s)",
    )  # fmt: skip
    bounds = {
        "max-error-rate": "share of failed requests above which it is rolled back",
        "max-latency-ratio": "mean times, as multiples of the old model's, above which it is rolled back",
    }
    for name, what in bounds.items():
        default = getattr(CanaryBounds, name.replace("-", "_"))
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="R", help=f"{what} (default: {default:g})"
        )
    parser.add_argument(
        "--build", action="store_true",
        help="build the candidate here, where the gate judged its checkpoint alone: what the build costs is unjudged",
    )  # fmt: skip
    parser.add_argument("--keep-old", action="store_true", help="leave the old model loaded: rollback is faster then")


def run(arguments: argparse.Namespace) -> int:
    """Promote; 0 if the candidate answers, 3 if it was rolled back."""
    from deepseek_triton.builders.errors import BuildError
    from deepseek_triton.builders.lifecycle.promotion.promote import promote
    from deepseek_triton.builders.lifecycle.promotion.state import PROMOTED
    from deepseek_triton.builders.repository.build import build
    from deepseek_triton.clients.printing import json_line

    try:
        shares = tuple(float(share) for share in arguments.shares.split(","))
    except ValueError as error:
        raise BuildError(f"shares are {arguments.shares!r}, must be numbers between commas") from error
    options = PromoteOptions(
        name=arguments.name,
        candidate=arguments.candidate,
        report=arguments.report,
        repository=arguments.repository,
        routes=arguments.routes,
        gateways=tuple(arguments.gateway),
        shares=shares,
        stage_s=arguments.stage_s,
        max_stage_s=arguments.max_stage_s,
        drain_s=arguments.drain_s,
        by=arguments.by,
        keeps_old=arguments.keep_old,
        builds=arguments.build,
        bounds=CanaryBounds(arguments.min_requests, arguments.max_error_rate, arguments.max_latency_ratio),
    )
    stays = "the shares stay as they are, unwatched; run the same command again, or `rollback`"
    with interruptible(lambda: stays), ProgressDisplay(is_quiet=arguments.quiet) as bar:
        promotion = promote(
            options,
            lambda old, new: build_like(
                options.repository, options.candidate, old, new, lambda found: build(found, bar.report, bar.say)
            ),
            make_control(arguments),
            bar.say,
        )
    if arguments.json:
        print(json_line(asdict(promotion)))
    elif promotion.status == PROMOTED:
        print(f"{promotion.new} answers {promotion.name}")
    else:
        print(f"{promotion.old} answers {promotion.name}: {promotion.why}")
    return 0 if promotion.status == PROMOTED else ROLLED_BACK


def make_control(arguments: argparse.Namespace) -> Any:
    """The server that was named."""
    from deepseek_triton.builders.lifecycle.promotion.triton_control import TritonControl
    from deepseek_triton.ensemble.server.options import ADMIN_KEY

    return TritonControl(arguments.server, os.environ.get(ADMIN_KEY, ""))


def build_like(repository: Path, candidate: Path, old: str, new: str, build: Callable[[BuildOptions], int]) -> None:
    """Build the candidate as `new`, with all that `old` was built with, calibrated on what the candidate learnt."""
    import shlex

    from deepseek_triton.builders.commands.build import read_options
    from deepseek_triton.builders.commands.table import make_command_parser
    from deepseek_triton.builders.lifecycle.learning.learn import CALIBRATION
    from deepseek_triton.builders.repository.models.built import BuiltModel

    words = shlex.split(BuiltModel.read(repository, old).manifest.command)[2:]
    built = read_options(make_command_parser("build").parse_args(words))
    calibration = candidate / CALIBRATION
    has_own = built.precision == "fp8" and calibration.is_file()
    build(
        replace(
            built,
            checkpoint=candidate,
            name=new,
            repository=repository,
            adapter=None,
            revision=None,
            calibration_text=calibration if has_own else built.calibration_text,
            ranges=None if has_own else built.ranges,
        )
    )
