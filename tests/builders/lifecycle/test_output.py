"""The directory of a step: whole, or not there, and a full disk is told in one line."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.output import new_directory
from deepseek_triton.builders.lifecycle.recovery.models import save_model
from tests.support.checkpoints import write_tiny


def test_a_full_disk_leaves_nothing_and_names_the_output(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    with (
        pytest.raises(BuildError, match=r"out: No space left on device; nothing was written; make room"),
        new_directory(tmp_path / "out", source, lambda line: None) as directory,
    ):
        (directory / "model.safetensors").touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(directory / "model.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_that_safetensors_tells_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    error = pytest.importorskip("safetensors").SafetensorError("I/O error: No space left on device (os error 28)")

    class FullDisk:
        def to(self, dtype: Any) -> FullDisk:
            return self

        def save_pretrained(self, directory: Path) -> None:
            raise error

    with pytest.raises(BuildError, match=r"No space left on device.*make room and run the same command again"):
        save_model(FullDisk(), open_checkpoint(write_tiny(tmp_path / "source")), tmp_path)
