"""Temporary directories of processes that were killed, and of those that live."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from deepseek_triton.ensemble.processes import temp_dirs as leftovers
from deepseek_triton.ensemble.processes.temp_dirs import make_directory, remove_directory, temporary_directory


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("temporary", "shared"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path / "shared")
    return tmp_path / "temporary"


@pytest.fixture
def dead() -> int:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_the_next_of_a_kind_removes_what_the_dead_left(temporary: Path, dead: int) -> None:
    shared = temporary.parent / "shared"
    names = {
        "gone": f"server-{dead}-abc",
        "ours": f"server-{os.getpid()}-abc",
        "other": f"servers-{dead}-abc",
        "foreign": "server-x1y2z3",
    }
    for name in names.values():
        (temporary / name / "models").mkdir(parents=True)
        (shared / f"{name}-region").touch()
    made = make_directory("server-")
    assert not (temporary / names.pop("gone")).exists()
    assert {path.name for path in temporary.iterdir()} == {*names.values(), made.name}
    assert {path.name for path in shared.iterdir()} == {f"{name}-region" for name in names.values()}
    assert made.name.startswith(f"server-{os.getpid()}-") and made.is_dir()


def test_a_directory_goes_with_its_shared_memory_alone(temporary: Path) -> None:
    shared = temporary.parent / "shared"
    directory = make_directory("server-")
    (shared / f"{directory.name}-a").touch()
    (shared / f"{directory.name}x-a").touch()
    remove_directory(directory)
    assert not directory.exists() and [path.name for path in shared.iterdir()] == [f"{directory.name}x-a"]
    remove_directory(directory)  # a second time does nothing


def test_a_context_removes_it_whatever_happens(temporary: Path) -> None:
    with pytest.raises(KeyboardInterrupt), temporary_directory("copy-") as directory:
        (directory / "models").mkdir()
        raise KeyboardInterrupt
    assert list(temporary.iterdir()) == []
