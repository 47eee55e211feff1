"""The console command `deepseek-triton`: arguments in, an exit status out.

The commands are in builders/commands/. A command's module is imported when that command is asked for, so that help is
quick and a machine with only the client installed can `chat`. Errors of every command become one line here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from deepseek_triton.builders.commands.table import COMMANDS, PROGRAM, make_command_parser
from deepseek_triton.clients.nearest import did_you_mean
from deepseek_triton.clients.printable import printable
from deepseek_triton.command_parser import CommandParser, PrintVersion
from deepseek_triton.interrupts import INTERRUPTED, end_within, interrupts_arrive
from deepseek_triton.quick_imports import collect_rarely


@interrupts_arrive()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0: done; 1: an error, told in one line on stderr; 2 (by SystemExit): wrong usage, a call without a command
        among it; 130: interrupted.
    """
    if argv is None:  # a process of its own
        collect_rarely()
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        if arguments.verbose:
            import logging

            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except KeyboardInterrupt:
        if argv is None:
            end_within()
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left, `| head` for one. The interpreter's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        print(f"error: {printable(message)}", file=sys.stderr)
        return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read a command line; `run` in the result is the command's function. Exits with 0 for help, 2 for wrong usage."""
    parser = _make_parser()
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    name, *words = argv
    if name.startswith("-"):
        parser.parse_args([name])
    if name not in COMMANDS:
        parser.error(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")
    return make_command_parser(name).parse_args(words)


def _make_parser() -> CommandParser:
    """The parser of what stands before a command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    parser = CommandParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [-h] [--version] COMMAND …",
        description="Build a Triton model repository from a checkpoint, and serve it.",
        epilog="\n".join(["commands:", *lines, "", f"{PROGRAM} COMMAND --help shows the options of a command."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=PrintVersion, help="print the version")
    return parser


def _explain(error: Exception) -> str | None:
    """The line for an error that a command may end with; None for a fault of this project."""
    from deepseek_triton.builders.errors import BuildError
    from deepseek_triton.clients.errors import ClientError
    from deepseek_triton.ensemble.server.installation import ServerError
    from deepseek_triton.extras import explain_missing

    return str(error) if isinstance(error, BuildError | ClientError | ServerError) else explain_missing(error)


if __name__ == "__main__":
    sys.exit(main())
