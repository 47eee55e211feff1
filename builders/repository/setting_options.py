"""The engine's settings as options of `deepseek-triton build`, and as the table in docs/settings.md."""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterable
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets import all_targets
from deepseek_triton.ensemble.protocol.settings import EngineSettings, Setting, SettingsError, to_text
from deepseek_triton.ensemble.protocol.text_settings import TextSettings

TABLE_HEAD = "| setting | option | default | meaning |\n|---|---|---|---|\n"


def add_setting_arguments(group: argparse._ArgumentGroup) -> None:
    """Add an option for each setting of an engine and of the models around it; one that isn't given is None."""
    for setting in (*EngineSettings.table().values(), *TextSettings.table().values()):
        add_setting_argument(group, setting)


def add_setting_argument(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """Add the option of one setting."""
    group.add_argument(setting.option, **_form(setting), help=_help(setting))


def read_settings(arguments: argparse.Namespace, without: Container[str] = ()) -> dict[str, Any]:
    """The engine's settings that were given, by name, but for those in `without`."""
    return given_values(arguments, [one for name, one in EngineSettings.table().items() if name not in without])


def given_values(arguments: argparse.Namespace, settings: Iterable[Setting]) -> dict[str, Any]:
    """Those of the settings that were given, by name.

    Raises:
        BuildError: a list of numbers isn't one.
    """
    given = {one: value for one in settings if (value := getattr(arguments, one.name)) is not None}
    try:
        return {one.name: one.parse(value) if one.kind is tuple else value for one, value in given.items()}
    except SettingsError as error:
        raise BuildError(str(error)) from error


def settings_table() -> str:
    """The settings as a Markdown table."""
    rows = [
        f"| `{setting.name}` | `{setting.option}` | {describe_default(setting)} | {meaning(setting)} |\n"
        for setting in EngineSettings.table().values()
    ]
    return TABLE_HEAD + "".join(rows)


def describe_default(setting: Setting) -> str:
    """ "8; cuda: 64, fewer where …": the common default, then the targets' own."""
    own = [
        ", ".join(filter(None, (f"{target.name}: {to_text(settings.defaults[setting.name])}", note)))
        for target in all_targets()
        for settings in [target.own_settings]
        if setting.name in settings.defaults
        for note in [settings.notes.get(setting.name)]
    ]
    return "; ".join([setting.describe_default(), *own])


def meaning(setting: Setting) -> str:
    """What it sets, and for which targets alone."""
    if setting.is_common:
        return setting.help
    owners = [target.name for target in all_targets() if setting.name in target.own_settings.own]
    return f"for target {' and '.join(owners)}: {setting.help}"


def _form(setting: Setting) -> dict[str, Any]:
    if setting.kind is bool:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if setting.choices:
        return {"choices": setting.choices}
    if setting.kind is tuple:
        return {"metavar": "N,M,…"}
    return {"type": setting.kind, "metavar": "N" if setting.kind is int else "X"}


def _help(setting: Setting) -> str:
    limits = [
        f"{word} {value}" for word, value in (("at least", setting.lowest), ("at most", setting.highest)) if value
    ]
    told = "; ".join([*limits, f"default: {describe_default(setting)}"])
    default = "" if setting.kind is bool else f" ({told})"
    return meaning(setting).replace("%", "%%") + default
