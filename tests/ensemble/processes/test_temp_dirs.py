"""Temporary directories of processes that were killed, and of those that live."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from deepseek_triton.ensemble.processes import temp_dirs as leftovers
from deepseek_triton.ensemble.processes.stat import pid_namespace
from deepseek_triton.ensemble.processes.temp_dirs import (
    make_directory,
    make_private,
    remove_directory,
    temporary_directory,
)


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
        "gone": f"server-{dead}-{pid_namespace()}-abc",
        "ours": f"server-{os.getpid()}-{pid_namespace()}-abc",
        "other": f"servers-{dead}-{pid_namespace()}-abc",
        "another container's": f"server-{dead}-{pid_namespace() + 1}-abc",
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


def planted(kind: str, path: Path) -> str:
    """Something in the place of a directory of ours; returns what is wrong with it."""
    if kind == "link":
        (path.parent / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(path.parent / "elsewhere")
    elif kind == "file":
        path.touch(mode=0o600)
    else:
        path.mkdir()
        path.chmod(int(kind, 8))
        return "is open to other users"
    return "is not a directory of its own"


@pytest.mark.parametrize("kind", ["link", "file", "755", "777", "701", "720"])
def test_a_planted_directory_is_refused(tmp_path: Path, kind: str) -> None:
    reason = planted(kind, tmp_path / "ours")
    with pytest.raises(PermissionError, match=reason):
        make_private(tmp_path / "ours")


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_private(tmp_path / "ours")
    make_private(tmp_path / "ours")  # a second time does nothing
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        make_private(tmp_path / "ours")
