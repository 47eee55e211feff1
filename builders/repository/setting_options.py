"""The engine's settings as options of `deepseek-triton build`, and as the table in docs/settings.md."""

from __future__ import annotations

import argparse
from collections.abc import Container
from typing import Any

from deepseek_triton.ensemble.protocol.settings import EngineSettings, Setting

TABLE_HEAD = "| setting | option | default | meaning |\n|---|---|---|---|\n"


def add_setting_arguments(group: argparse._ArgumentGroup) -> None:
    """Add an option for each setting; one that isn't given is None."""
    for setting in EngineSettings.table().values():
        group.add_argument(setting.option, **_form(setting), help=_help(setting))


def read_settings(arguments: argparse.Namespace, without: Container[str] = ()) -> dict[str, Any]:
    """The settings that were given, by name, but for those in `without`."""
    values = {name: getattr(arguments, name) for name in EngineSettings.table() if name not in without}
    return {name: value for name, value in values.items() if value is not None}


def settings_table() -> str:
    """The settings as a Markdown table."""
    rows = [
        f"| `{setting.name}` | `{setting.option}` | {setting.describe_default()} | {_meaning(setting)} |\n"
        for setting in EngineSettings.table().values()
    ]
    return TABLE_HEAD + "".join(rows)


def _form(setting: Setting) -> dict[str, Any]:
    if setting.kind is bool:
        return {"action": "store_const", "const": True}
    if setting.choices:
        return {"choices": setting.choices}
    return {"type": setting.kind, "metavar": "N" if setting.kind is int else "X"}


def _help(setting: Setting) -> str:
    default = "" if setting.kind is bool else f" (default: {setting.describe_default()})"
    return _meaning(setting).replace("%", "%%") + default


def _meaning(setting: Setting) -> str:
    only = f"for target {' and '.join(setting.targets)}: " if setting.targets else ""
    return only + setting.help
