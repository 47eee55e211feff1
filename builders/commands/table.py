"""Every command of `deepseek-triton`, and the parser of each."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from deepseek_triton.builders.commands.parser import CommandParser

PROGRAM = "deepseek-triton"
# Command → what it does. Its module has its name.
COMMANDS = {
    "build": "make a model repository from a checkpoint",
    "check": "validate a model repository without a server",
    "serve": "run tritonserver on a model repository until interrupted",
    "generate": "complete a text",
    "chat": "talk to a model",
    "score": "choose among labels for a text",
    "evaluate": "measure what FP8 costs in quality, against the float checkpoint",
    "fit": "calibrate a scoring model on labelled examples",
    "tune": "find the configuration that serves most within a latency limit",
    "compare": "show two load tests' differences with their confidence intervals",
    "completion": "print a bash script that completes commands and options",
}


def make_command_parser(name: str) -> CommandParser:
    """Import the command's module, and make the parser of its options."""
    module: Any = importlib.import_module(f"{__package__}.{name}")
    summary = COMMANDS[name]
    parser = CommandParser(prog=f"{PROGRAM} {name}", description=f"{summary[0].upper()}{summary[1:]}.")
    module.add_arguments(parser)
    _add_verbosity_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def _add_verbosity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add -q and -v, which every command has."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="print results and errors alone")
    group.add_argument("-v", "--verbose", action="store_true", help="print more: times, and the log of what is done")
