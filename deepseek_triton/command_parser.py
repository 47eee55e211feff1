"""The argument parser of every command: exact option names, and an error in two lines with a suggestion."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from deepseek_triton.clients.nearest import did_you_mean, nearest

UNRECOGNIZED = "unrecognized arguments: "
INVALID = re.compile(r": invalid (int|float) value: (.+)$")
KINDS = {"int": "a whole number", "float": "a number"}


DISTRIBUTION = "deepseek-triton"  # the package that has every command


class PrintVersion(argparse.Action):
    """The option `--version`: prints the program's name and the package's version, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        try:
            version = metadata.version(DISTRIBUTION)
        except metadata.PackageNotFoundError:
            version = "(not installed: run from its sources)"
        print(f"{parser.prog} {version}")
        parser.exit()


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviated options and prints no usage with an error."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self._words: list[str] = []

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but the words are kept: an error may be about a misspelt option among them."""
        self._words = list(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(self._words, namespace)
        if rest and self._subparsers is None:  # told here: a parser above knows none of these options
            self.error(UNRECOGNIZED + " ".join(rest))
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print the error and where help is; exit with status 2."""
        options = sorted(self._option_string_actions)
        words = self._words[: self._words.index("--")] if "--" in self._words else self._words
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in options:
                message = f"unknown option {name}{self._hint(name, options)}"
                break
        else:
            message = self._explain(message)
        self.exit(2, f"error: {message}\nsee: {self.prog} --help\n")

    def _hint(self, name: str, options: Sequence[str]) -> str:
        """What may have been meant: an argument that has no `--`, an option spelt nearly so, or one that ends so.

        They are compared without the dashes, which all of them share.
        """
        word = name.removeprefix("--")
        if word in [action.dest for action in self._get_positional_actions()]:
            return f": give the {word} without it"
        bare = [option.removeprefix("--") for option in options if option.startswith("--")]
        if near := nearest(word, bare):
            return f"; did you mean --{near}?"
        ends = [option for option in bare if option.endswith(f"-{word}")]
        return f"; did you mean --{ends[0]}?" if ends else ""

    def _explain(self, message: str) -> str:
        """argparse's message in words that say what to write instead."""
        if extra := message.removeprefix(UNRECOGNIZED) if message.startswith(UNRECOGNIZED) else "":
            names = [action.dest for action in self._get_positional_actions()]
            takes = f"takes {' and '.join(names)} alone" if names else "takes options alone"
            return f"{self.prog} {takes}; too much: {extra} (a text with spaces needs quotes)"
        return INVALID.sub(lambda match: f": {match[2]} is not {KINDS[match[1]]}", message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            what = f"{value!r} is not one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
            raise argparse.ArgumentError(action, what)
