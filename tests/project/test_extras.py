"""What is missing is named with a command that installs it, and help needs no optional package."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton import extras

# Every command's help, where no optional package can be imported.
HELP = """
import importlib.abc, sys
from deepseek_triton.extras import MODULE_EXTRAS

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MODULE_EXTRAS:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
from deepseek_triton.builders.commands.table import COMMANDS, make_command_parser
for command in COMMANDS:
    assert make_command_parser(command).format_help()
    print(command)
"""


@pytest.mark.slow
def test_help_needs_no_optional_package() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.split()) > 10


class Installed:
    """A distribution as pip records it."""

    def __init__(self, url: str | None) -> None:
        self._text = None if url is None else json.dumps({"url": url})

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self._text


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("dist/a package.whl", "pip install '{}[cuda]'"),
        ("clone", "pip install '{}[cuda]'"),
        ("gone.whl", "pip install '.[cuda]' (in a clone of deepseek-triton)"),
        (None, "pip install '.[cuda]' (in a clone of deepseek-triton)"),
    ],
)
def test_an_installed_package_is_installed_from_where_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, command: str
) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "a package.whl").touch()
    (tmp_path / "clone").mkdir()
    path = None if source is None else tmp_path / source
    monkeypatch.setattr(extras, "_CLONE", tmp_path / "site-packages")
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(None if path is None else path.as_uri()))
    assert extras.install_command("cuda") == command.format(path)


def test_a_clone_is_installed_where_it_lies() -> None:
    root = Path(__file__).parents[2]
    assert extras.install_command("cuda") == f"pip install -e '{root}[cuda]'"


def test_a_program_ends_with_the_line() -> None:
    def main() -> int:
        raise ModuleNotFoundError("no", name="jinja2.nodes")

    with pytest.raises(SystemExit, match=r"^error: jinja2.nodes is not installed; run: pip install"):
        extras.exit_with(main)


def test_an_error_of_another_kind_is_raised() -> None:
    def main() -> Any:
        raise ModuleNotFoundError("no", name="made_up")

    with pytest.raises(ModuleNotFoundError):
        extras.exit_with(main)
