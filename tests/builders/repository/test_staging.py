"""What a killed build leaves is removed by the next one of that model, and never while its owner lives."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.models.built import BuiltModel
from deepseek_triton.builders.repository.models.prune import removals, remove
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.repository.staging import size_of
from tests.support.tuning import tiny_checkpoint

ROOT = Path(__file__).parents[3]
# Builds a model, and stops in the middle of it: at a word on standard input it goes on.
BUILDER = """
import sys
from pathlib import Path
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions

def report(what, done, total):
    if done == total:
        print("half", flush=True)
        sys.stdin.readline()

build(BuildOptions(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), max_seq_len=32), report)
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path)


@pytest.fixture
def half_built(checkpoint: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a build of `m`."""
    command = [sys.executable, "-c", BUILDER, str(checkpoint), "m", str(tmp_path / "work" / "models")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        yield process
        process.kill()


def hidden(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "work").iterdir() if path.name != "models"]


@pytest.mark.slow
def test_a_killed_builds_directory_is_removed_and_told(
    half_built: subprocess.Popen[str], checkpoint: Path, tmp_path: Path
) -> None:
    models, said = tmp_path / "work" / "models", list[str]()
    half_built.send_signal(signal.SIGKILL)
    half_built.wait()
    (leftover,) = hidden(tmp_path)
    num_bytes = size_of(leftover)
    assert num_bytes > 1000
    build(BuildOptions(checkpoint, "m-2", models, max_seq_len=32), say=said.append)
    build(BuildOptions(checkpoint, "other", models, max_seq_len=32), say=said.append)
    assert said == [] and hidden(tmp_path) == [leftover], "it is another model's"
    build(BuildOptions(checkpoint, "m", models, max_seq_len=32), say=said.append)
    assert said == [f"removed what a killed build of m left: {leftover}, {num_bytes:,} bytes"]
    assert hidden(tmp_path) == [] and check_repository(models) == []


@pytest.mark.slow
def test_a_living_builds_directory_stays(half_built: subprocess.Popen[str], checkpoint: Path, tmp_path: Path) -> None:
    models = tmp_path / "work" / "models"
    (owned,) = hidden(tmp_path)
    before = size_of(owned)
    with pytest.raises(BuildError, match=rf"^m is being built by another process, in {re.escape(str(owned))}; wait"):
        build(BuildOptions(checkpoint, "m", models, max_seq_len=32))
    assert size_of(owned) == before
    build(BuildOptions(checkpoint, "other", models, max_seq_len=32))
    half_built.communicate("go on\n")
    assert half_built.returncode == 0 and hidden(tmp_path) == [] and check_repository(models) == []


@pytest.mark.slow
def test_what_only_looks_like_a_leftover_stays(checkpoint: Path, tmp_path: Path) -> None:
    models = tmp_path / "work" / "models"
    names = (
        ".models-building-m~two",
        ".models-building-m",
        ".others-building-m~abcdefgh",
        "models-building-m~abcdefgh",
    )
    for name in names:
        (tmp_path / "work" / name).mkdir(parents=True)
    build(BuildOptions(checkpoint, "m", models, max_seq_len=32))
    assert sorted(path.name for path in hidden(tmp_path)) == sorted(names)


MOVER = """
import os, signal, sys
from pathlib import Path
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions

left = int(sys.argv[3])
move = {name: getattr(Path, name) for name in ("rename", "replace")}

def killed(name):
    def moved(path, target):
        global left
        if "-building-" in str(path):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return move[name](path, target)
    return moved

Path.rename, Path.replace = killed("rename"), killed("replace")
build(BuildOptions(Path(sys.argv[1]), "m", Path(sys.argv[2]), max_seq_len=32))
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_moves", [0, 2, 4, 6])
def test_a_build_that_is_killed_while_it_moves_in_is_mended_by_the_next(
    num_moves: int, checkpoint: Path, tmp_path: Path
) -> None:
    """Four versions are moved in, then four configurations."""
    models, said = tmp_path / "work" / "models", list[str]()
    command = [sys.executable, "-c", MOVER, str(checkpoint), str(models), str(num_moves)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert len(hidden(tmp_path)) == 1
    build(BuildOptions(checkpoint, "m", models, max_seq_len=32), say=said.append)
    assert hidden(tmp_path) == [] and any("removed what a killed build of m left" in line for line in said)
    assert check_repository(models) == []
    model = BuiltModel.read(models, "m")
    assert model.settings() == model.defaults() and len(model.part_dirs(model.versions[-1])) == 4
    for removal in removals(model, keep=1, served=()):
        remove(model, removal)
    assert all(
        [path.name for path in (models / part).glob("[0-9]*")] == [str(model.versions[-1])] for part in model.texts
    )
