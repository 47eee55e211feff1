"""README.md and the pages that show how to begin: their commands and programs are run; the tree is the files'.

    ```bash     run as it stands against a real server, but for four kinds of line:
                  make …                    a target of the Makefile
                  deepseek-triton build …   options that the command has; so with the others of PARSED
                  docker …                  not run; a --target is a stage of the Dockerfile
                  . .venv/bin/activate, pip install …, deepseek-triton serve …   not run: the tests have all that
    ```python   run as it stands against a real server

A block in another language fails: nothing that could run stays unseen. `make demo`'s output is test_examples' business.
"""

from __future__ import annotations

import os
import re
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

from deepseek_triton.builders.cli import parse
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.project.test_dockerfile import STAGES
from tests.project.test_layout import checkout

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "docs/getting-started.md", "docs/serving.md", "docs/targets.md")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LANGUAGES = ("bash", "python")

# The command line with the test server's addresses as its defaults.
COMMAND = """#!{python}
import sys
from deepseek_triton.builders.cli import main
from deepseek_triton.clients.connect import DEFAULT_URLS
DEFAULT_URLS.update(grpc={grpc!r}, http={http!r})
sys.exit(main())
"""


@dataclass(frozen=True)
class Block:
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Commands, those that go on after a backslash joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def read_blocks(text: str) -> list[Block]:
    assert len(re.findall("^```", text, re.MULTILINE)) % 2 == 0, "a block doesn't end"
    found = re.findall(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(language, code) for language, code in found]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


BLOCKS = [block for page in PAGES for block in read_blocks(text_of(page))]
LINES = [line for block in BLOCKS if block.language == "bash" for line in block.lines]
# They take a checkpoint of the reader's: only their options are checked.
PARSED = tuple(f"deepseek-triton {command} " for command in ("build", "compare", "evaluate", "fit", "tune"))
# What the tests' environment has already: a server, and the packages.
THERE_ALREADY = (". .venv/bin/activate", "pip install ", "deepseek-triton serve ")
NOT_RUN = ("make ", *PARSED, *THERE_ALREADY, "docker ")


def runnable(block: Block) -> str:
    """What of a block is run."""
    if block.language == "python":
        return block.text
    return "\n".join(line for line in block.lines if not line.startswith(NOT_RUN))


# docs/getting-started.md asks a model of its own: test_getting_started.py runs it.
RUNNABLE = [
    block
    for page, block in ((page, block) for page in PAGES for block in read_blocks(text_of(page)))
    if page != "docs/getting-started.md" and runnable(block)
]


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} == set(LANGUAGES)


@pytest.mark.parametrize("command", ["deepseek-triton generate", "deepseek-triton check", "curl", "GrpcClient"])
def test_readme_shows_each_way_to_ask(command: str) -> None:
    assert any(command in runnable(block) for block in RUNNABLE)


def test_a_readme_without_anything_to_run_would_not_pass() -> None:
    assert [runnable(block) for block in read_blocks("# x\n```bash\nmake demo\n```\n")] == [""]
    assert RUNNABLE, "README.md shows nothing that can be run"


@pytest.fixture
def environment(server: TritonServer, smollm2_repository: Path, tmp_path: Path) -> dict[str, str]:
    """A shell's, in a directory with a model repository, beside a server."""
    (tmp_path / "model_repository").symlink_to(smollm2_repository)
    command = tmp_path / "bin" / "deepseek-triton"
    command.parent.mkdir()
    command.write_text(COMMAND.format(python=sys.executable, grpc=server.grpc_url, http=server.http_url))
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path}


def with_ports(text: str, server: TritonServer) -> str:
    ports = {"8000": server.http_port, "8001": server.grpc_port, "8002": server.metrics_port}
    return re.sub(r"\b(localhost|127\.0\.0\.1):(800[012])\b", lambda match: f"127.0.0.1:{ports[match[2]]}", text)


@pytest.mark.server
@pytest.mark.parametrize("block", RUNNABLE, ids=[runnable(block).split("\n")[0][:40] for block in RUNNABLE])
def test_a_block_runs_as_it_stands(
    server: TritonServer, environment: dict[str, str], tmp_path: Path, block: Block
) -> None:
    code = with_ports(runnable(block), server)
    command = ["bash", "-euo", "pipefail", "-c", code] if block.language == "bash" else [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    if "capital of France" in code:
        assert "Paris" in done.stdout


MAKE = sorted(
    {
        target
        for line in LINES
        if line.startswith("make ")
        for target in line.split("#")[0].split()[1:]
        if "=" not in target
    }
    | set(re.findall(r"`make ([\w-]+)`", README))
)


@pytest.mark.parametrize("target", MAKE)
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(["make", "--no-print-directory", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" not in done.stdout, f"{target} is a file or directory, not a target"


def test_the_two_commands_come_first() -> None:
    assert [line.split("#")[0].strip() for line in LINES[:2]] == ["make demo", "make test"]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(PARSED)])
def test_a_line_that_is_only_parsed_has_the_options_that_the_command_has(line: str) -> None:
    arguments = parse(shlex.split(line, comments=True)[1:])
    assert arguments.run


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("docker build ")] or [""])
def test_a_docker_line_names_a_stage(line: str) -> None:
    assert set(re.findall(r"--target[ =](\S+)", line)) <= set(STAGES)


def tree() -> list[Path]:
    """The paths that the tree names: two spaces of indent for each directory, two or more before the comment."""
    (block,) = (block for block in read_blocks(ARCHITECTURE) if block.language == "text")
    paths: list[Path] = []
    parents: list[Path] = []
    for line in block.text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = line.strip().partition("  ")[0].split(", ")
        parents = [*parents[:depth], Path(*parents[depth - 1 : depth], names[0])]
        paths += [Path(*parents[depth - 1 : depth], name) for name in names]
    return paths


def test_the_tree_names_what_exists() -> None:
    missing = [str(path) for path in tree() if not (ROOT / path).exists()]
    assert missing == []
    assert len(tree()) > 10


def test_every_directory_is_in_the_tree() -> None:
    directories = {path.parts[0] for path in checkout() if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    assert directories <= {path.parts[0] for path in tree()}


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"))
def test_every_page_is_in_the_index(page: str) -> None:
    assert f"({page})" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


def documents() -> list[Path]:
    return [path for path in checkout() if path.suffix == ".md" and path.parts[0] != "benchmarks"]


@pytest.mark.parametrize("page", documents(), ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [target for target in targets if ":" not in target and not (ROOT / page.parent / target).exists()]
    assert missing == []


# One file for each command, and for each part of the engine and of its CUDA runner: they name themselves.
FLAT = (Path("builders/commands"), Path("ensemble/engine"), Path("ensemble/engine/runners/cuda"))


def test_folders_stay_small_enough_to_be_seen_at_once() -> None:
    entries: dict[Path, set[str]] = defaultdict(set)
    for path in (path for path in checkout() if path.parts[0] in ("builders", "ensemble", "gateway")):
        for folder in [folder for folder in path.parents if folder.parts]:
            entries[folder].add(path.relative_to(folder).parts[0])
    large = {str(folder): len(names - {"__init__.py"}) for folder, names in entries.items() if folder not in FLAT}
    assert {folder: number for folder, number in large.items() if number > 12} == {}
    assert set(FLAT) <= set(entries)


def test_most_files_fit_on_two_screens() -> None:
    tops = ("builders", "clients", "ensemble", "gateway", "loadtest")
    lengths = [len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in checkout()
               if path.suffix == ".py" and path.parts[0] in tops and path.name != "__init__.py"]  # fmt: skip
    assert statistics.median(lengths) <= 100
