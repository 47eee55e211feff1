"""`deepseek-triton gate`: measure a candidate against the model that it is to replace, and say whether it may."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepseek_triton.builders.commands.interrupts import interruptible
from deepseek_triton.builders.commands.models import add_repository_argument, path
from deepseek_triton.builders.commands.progress import ProgressDisplay
from deepseek_triton.builders.commands.promote import build_like
from deepseek_triton.builders.lifecycle.learning.examples import ON_BAD
from deepseek_triton.builders.lifecycle.learning.options import DEVICES, LearnOptions
from deepseek_triton.builders.repository.options import BuildOptions

NOT_PASSED = 3  # exit status; 1 is an error's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("candidate", type=path, help="Hugging Face directory, or .gguf file")
    parser.add_argument(
        "--name",
        help="name that clients ask for: the candidate is built like the model that answers it, and both builds are "
        "judged as they serve; `promote` takes that build",
    )
    add_repository_argument(parser)
    parser.add_argument("--routes", type=Path, metavar="FILE", help="route file, which says what answers --name")
    parser.add_argument(
        "--against", type=path, metavar="BASE",
        help="in place of --name: a checkpoint; both checkpoints are judged as transformers runs them",
    )  # fmt: skip
    parser.add_argument("--limits", type=Path, required=True, metavar="FILE", help="limits.json: what must hold")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="new data, as `learn` had it")
    parser.add_argument("--replay", type=Path, required=True, metavar="FILE", help="old data, as `learn` had it")
    parser.add_argument(
        "--report", type=Path, required=True, metavar="DIR", help="directory for report.json and report.html"
    )
    parser.add_argument(
        "--held-out", type=float, metavar="R", help="share of the lines to judge by (default: what `learn` kept)"
    )
    parser.add_argument(
        "--window", type=int, default=LearnOptions.window_len, metavar="N",
        help="tokens of an example at most (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--bad-lines", default=LearnOptions.bad_lines, choices=ON_BAD,
        help="what becomes of lines that can't be used (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default=LearnOptions.device, choices=DEVICES, help="where to compute (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Judge; 0 if every limit holds, 3 if one doesn't."""
    from dataclasses import asdict

    from deepseek_triton.builders.checkpoint.files.hub import local_checkpoint
    from deepseek_triton.builders.lifecycle.gate.gate import GateOptions, gate
    from deepseek_triton.builders.lifecycle.gate.judged_build import BuildOfGate
    from deepseek_triton.builders.lifecycle.gate.report import HTML_NAME, JSON_NAME
    from deepseek_triton.builders.repository.build import build
    from deepseek_triton.clients.printing import json_line

    stays = "no report was written; the same command goes on from a build that is complete"
    with interruptible(lambda: stays), ProgressDisplay(is_quiet=arguments.quiet) as bar:
        options = GateOptions(
            candidate=local_checkpoint(arguments.candidate, None, bar.report),
            base=None if arguments.against is None else local_checkpoint(arguments.against, None, bar.report),
            limits=arguments.limits,
            data=arguments.data,
            replay=arguments.replay,
            repository=arguments.repository if arguments.name else None,
            name=arguments.name or "",
            routes=arguments.routes,
            held_out=arguments.held_out,
            window_len=arguments.window,
            device=arguments.device,
            bad_lines=arguments.bad_lines,
        )

        def build_as(old: str, new: str) -> None:
            def build_it(found: BuildOptions) -> int:
                return build(found, bar.report, bar.say)

            build_like(arguments.repository, options.candidate, old, new, build_it)

        report = gate(options, bar.say, build_as)
    report.save(arguments.report)
    if arguments.name:
        BuildOfGate(arguments.repository, arguments.name, arguments.routes).settle(has_passed=report.passed)
    if arguments.json:
        print(json_line({"passed": report.passed, **asdict(report)}))
    else:
        for verdict in report.verdicts:
            print(f"{'passed' if verdict.passed else 'FAILED'}  {verdict.name}: {verdict.why}")
        print(f"the candidate {'passed' if report.passed else 'did not pass'}")
        print(f"wrote {arguments.report / JSON_NAME} and {arguments.report / HTML_NAME}")
    return 0 if report.passed else NOT_PASSED
