"""docs/command-line.md tells of every command, and of `chat`'s own."""

from __future__ import annotations

import re
from pathlib import Path

from deepseek_triton.builders.commands.table import COMMANDS, make_command_parser
from deepseek_triton.clients import chat_commands
from deepseek_triton.clients.cli import MODEL_VARIABLE, URL_VARIABLE

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")


def test_the_page_has_every_command_and_which_have_json() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \| [^|]+ \|([^|]*)\|$", PAGE, re.MULTILINE))
    assert list(rows) == list(COMMANDS)
    for name, json in rows.items():
        has_json = any("--json" in action.option_strings for action in make_command_parser(name)._actions)
        assert bool(json.strip()) == has_json


def test_the_page_has_the_chats_commands_and_the_variables() -> None:
    for name in (*chat_commands.COMMANDS, URL_VARIABLE, MODEL_VARIABLE):
        assert f"`{name}" in PAGE or f"{name}=" in PAGE
