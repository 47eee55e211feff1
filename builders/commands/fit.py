"""`deepseek-triton fit`: calibrate a scoring model on labelled examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from deepseek_triton.builders.commands.interrupts import interruptible
from deepseek_triton.builders.commands.models import add_repository_argument, require_model
from deepseek_triton.builders.commands.progress import ProgressDisplay
from deepseek_triton.builders.scoring.fit import METHODS
from deepseek_triton.ensemble.scoring.calibration import ProbabilityCalibration

# Figure → whether more of it is better.
FIGURES = {"expected_calibration_error": False, "negative_log_likelihood": False, "accuracy": True}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("model", help="name of the scoring model")
    parser.add_argument("examples", type=Path, help='JSON lines of {"text": …, "label": …}')
    add_repository_argument(parser)
    parser.add_argument(
        "--method",
        default="bias",
        choices=METHODS,
        help="temperature: one factor; bias: and an offset for each label; contextual: offsets measured on texts "
        "without content; head: a logistic regression on the hidden state (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Fit, write the calibration, and print what it changed."""
    from deepseek_triton.builders.commands.fitting import fit_model
    from deepseek_triton.clients.printing import json_line

    require_model(arguments.repository, arguments.model)
    with interruptible(lambda: "nothing was written"), ProgressDisplay(is_quiet=arguments.quiet) as bar:
        calibration, path = fit_model(
            arguments.repository, arguments.model, arguments.examples, arguments.method, bar.report
        )
    if arguments.json:
        print(json_line({"method": calibration.method, "report": calibration.report, "path": path}))
        return 0
    print(f"{describe(calibration)}\nwrote {path}; a running server reads it when it is started again")
    return 0


def describe(calibration: ProbabilityCalibration) -> str:
    """Each figure before and after, and a warning for those that became worse."""
    report = calibration.report
    lines = [f"{calibration.method}, fitted on {report['examples']:g} examples, judged on those held out:"]
    worse = []
    for name, more_is_better in FIGURES.items():
        before, after = report[f"{name}_before"], report[f"{name}_after"]
        words = name.replace("_", " ")
        lines.append(f"{words:28} {before:.4f} before, {after:.4f} after")
        if (after < before) if more_is_better else (after > before):
            worse.append(words)
    if worse:
        lines.append(f"beware: the calibration made worse: {', '.join(worse)}; give more examples or another --method")
    return "\n".join(lines)
