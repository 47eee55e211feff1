"""`deepseek-triton configure`: change the settings of a built model without building it again."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from deepseek_triton.builders.commands import build
from deepseek_triton.builders.commands.models import add_memory_argument, add_repository_argument, require_model
from deepseek_triton.builders.commands.scoring_arguments import SHARED_OPTIONS
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.setting_options import (
    add_setting_argument,
    add_setting_arguments,
    given_values,
)
from deepseek_triton.builders.scoring.options import Batching
from deepseek_triton.clients.cli import add_connection_arguments
from deepseek_triton.command_parser import CommandParser
from deepseek_triton.ensemble.protocol.settings import EngineSettings, to_text
from deepseek_triton.ensemble.protocol.text_settings import TextSettings
from deepseek_triton.ensemble.scoring.settings import ScoringSettings

SETTINGS = {**EngineSettings.table(), **Batching.table(), **ScoringSettings.table(), **TextSettings.table()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting, and hidden ones for what only a build can change."""
    parser.add_argument("model", help="name of the served model")
    add_repository_argument(parser)
    add_memory_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the changes as JSON")
    parser.add_argument("--reset-settings", action="store_true", help="give all other settings their defaults")
    add_connection_arguments(parser)
    add_setting_arguments(parser.add_argument_group("settings of a model that generates"))
    scoring = parser.add_argument_group("settings of a model that scores")
    for name, setting in {**Batching.table(), "max_pass_tokens": ScoringSettings.table()["max_pass_tokens"]}.items():
        if name not in SHARED_OPTIONS:
            add_setting_argument(scoring, setting)
    for action in fixed_options():
        nargs = 0 if action.nargs == 0 else None
        parser.add_argument(
            *action.option_strings, dest=action.dest, action=_Fixed, nargs=nargs, help=argparse.SUPPRESS
        )


def fixed_options() -> list[argparse.Action]:
    """The options of `build` whose values can't be changed afterwards."""
    parser = CommandParser(add_help=False)
    build.add_arguments(parser)
    own = {*SETTINGS, "repository", "memory", "json", "reset_settings", "name"}
    return [action for action in parser._actions if action.option_strings and action.dest not in own]


class _Fixed(argparse.Action):
    """Collects the options that need a build, and their words, in `fixed`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        fixed = [
            *getattr(namespace, "fixed", ()),
            (self.dest, [str(option)] if self.nargs == 0 else [str(option), values]),
        ]
        namespace.fixed = fixed


def run(arguments: argparse.Namespace) -> int:
    """Change the settings, and tell what changed and that a running server must be started again."""
    from deepseek_triton.builders.commands.serving_now import serving, where
    from deepseek_triton.builders.repository.models.built import BuiltModel
    from deepseek_triton.builders.repository.models.configure import configure
    from deepseek_triton.builders.repository.models.repair import write_unreadable_anew
    from deepseek_triton.builders.tune.repository import finish_pending

    require_model(arguments.repository, arguments.model)
    finish_pending(arguments.repository, "configure")
    anew = write_unreadable_anew(arguments.repository, arguments.model) if arguments.reset_settings else []
    model = BuiltModel.read(arguments.repository, arguments.model)
    if fixed := getattr(arguments, "fixed", None):
        _refuse_fixed(model, fixed)
    values = given_values(arguments, SETTINGS.values())
    if not values and not arguments.reset_settings:
        raise BuildError(f"no setting was given; give one, as --max-queue-size 64, or see inspect {model.name}")
    changes = configure(model, values, is_reset=arguments.reset_settings, memory=arguments.memory)
    served = serving(arguments, model.repository, model.name).versions if changes else None
    if arguments.json:
        from deepseek_triton.clients.printing import json_line

        print(
            json_line(
                {
                    "model": model.name,
                    "changes": changes,
                    "written_anew": anew,
                    "edited": model.edited,
                    "served": served,
                }
            )
        )
        return 0
    for path in anew:
        print(f"{path} couldn't be read: it was written anew, with the defaults")
    for path in model.edited:
        print(f"{path} was edited by hand: what it says beside its settings stays until the next build")
    for change in changes:
        print(f"{change.name}: {to_text(change.before)} → {to_text(change.after)}")
    if not changes and not anew:
        print(f"{model.name} has these settings already")
    elif not arguments.quiet:
        restart = shlex.join(["deepseek-triton", "serve", str(arguments.repository)])
        if served:
            print(
                f"the server at {where(arguments)} has the old settings until it is ended and started again: {restart}"
            )
        else:
            print(f"a server that is running already must be ended and started again: {restart}")
    return 0


def _refuse_fixed(model: Any, fixed: list[tuple[str, list[str]]]) -> None:
    from deepseek_triton.ensemble.artefacts.rebuild_command import with_options

    names = ", ".join(dict.fromkeys(name for name, _ in fixed))
    words = [word for _, option in fixed for word in option]
    command = with_options(model.manifest.command, [option[0] for _, option in fixed], words)
    verb = "are" if len(fixed) > 1 else "is"
    raise BuildError(f"{names} {verb} fixed when a model is built; rebuild with: {command}")
