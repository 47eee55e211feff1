"""`deepseek-triton tune`: find the configuration that serves most requests within a latency limit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deepseek_triton.builders.commands.interrupts import interruptible
from deepseek_triton.builders.commands.models import add_repository_argument, require_model
from deepseek_triton.builders.commands.progress import ProgressDisplay
from deepseek_triton.builders.commands.scoring_arguments import split_labels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    from deepseek_triton.builders.tune.options import LOWEST, TuneOptions

    parser.add_argument("model", help="name of the served model")
    parser.add_argument(
        "--p99-ms",
        type=float,
        required=True,
        metavar="MS",
        help="limit of the 99th percentile of a request's latency, in milliseconds, above 0",
    )
    add_repository_argument(parser)
    parser.add_argument(
        "--clients",
        type=int,
        default=TuneOptions.clients,
        metavar="N",
        help=f"clients that ask at the same time, at least {LOWEST['clients']} (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=TuneOptions.seconds,
        metavar="S",
        help="length of each measurement, above 0 (default: %(default)g)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=TuneOptions.rounds,
        metavar="N",
        help=f"measurements of each candidate before one is chosen, at least {LOWEST['rounds']} (default: %(default)s)",
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        default=TuneOptions.budget_s,
        metavar="S",
        help="seconds for the whole run, above 0 (default: %(default)g)",
    )
    parser.add_argument(
        "--texts", type=Path, metavar="FILE", help="what clients send, a text on each line (default: a built-in set)"
    )
    parser.add_argument("--labels", metavar="A,B,…", help="labels for a scoring model that was built without")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=TuneOptions.max_tokens,
        metavar="N",
        help=f"tokens generated for each request, at least {LOWEST['max_tokens']} (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="directory of journal, table and plot (default: tune-MODEL)"
    )
    parser.add_argument("--dry-run", action="store_true", help="leave the repository as it is")


def run(arguments: argparse.Namespace) -> int:
    """Tune, and print the table and what was written."""
    from deepseek_triton.builders.commands.tuning import conclusion, tune
    from deepseek_triton.builders.tune.options import TuneOptions

    goes_on = "the same command goes on from the journal"
    with interruptible(lambda: goes_on), ProgressDisplay(is_quiet=arguments.quiet) as bar:
        options = TuneOptions(
            name=arguments.model,
            repository=arguments.repository,
            p99_ms=arguments.p99_ms,
            clients=arguments.clients,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            budget_s=arguments.budget_s,
            texts=arguments.texts,
            labels=split_labels(arguments.labels),
            max_tokens=arguments.max_tokens,
            output=arguments.output,
            is_dry=arguments.dry_run,
        )
        require_model(options.repository, options.name)
        tuned = tune(options, bar.report, bar.say)
    print(tuned.table)
    if not tuned.is_complete:
        print("the budget is used up; the same command with more --budget-s goes on from the journal")
    for path in tuned.changed:
        print(f"wrote {path}")
    print(f"{conclusion(tuned)}; see {options.directory}")
    if not tuned.is_held:
        print(
            f"error: nothing holds {options.p99_ms:g} ms for sure; raise --p99-ms, or lower --clients", file=sys.stderr
        )
        return 1
    return 0
