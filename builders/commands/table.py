"""Every command of `deepseek-triton`, and the parser of each."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from deepseek_triton.command_parser import CommandParser

PROGRAM = "deepseek-triton"
# Command → what it does. Its module has its name, with "_" for "-".
COMMANDS = {
    "plan": "tell what a model needs of GPUs, how fast it is there, and what must give",
    "build": "make a model repository from a checkpoint",
    "prune": "remove channels, heads, layers or experts of a checkpoint that matter least",
    "recover": "train a pruned checkpoint to answer as its parent does",
    "learn": "train a checkpoint on new data, beside old data that it must not forget",
    "gate": "judge a candidate by limits, against the checkpoint that it is to replace",
    "promote": "let a candidate that passed the gate answer, share by share, watched",
    "rollback": "let the model before the last promotion answer again",
    "configure": "change a built model's settings without building it again",
    "inspect": "show a model's versions, sizes and settings, and what serves now",
    "list": "show the models of a repository, and which of them serve now",
    "prune-versions": "free the disk of old versions; what serves and the newest stay",
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
    module: Any = importlib.import_module(f"{__package__}.{name.replace('-', '_')}")
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
