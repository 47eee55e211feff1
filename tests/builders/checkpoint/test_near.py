"""A path that holds no checkpoint: the error says where there are some, or what to give instead."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deepseek_triton.builders.checkpoint.files import near
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from tests.support.tuning import tiny_checkpoint


def refusal(path: Path) -> str:
    with pytest.raises(BuildError) as caught:
        open_checkpoint(path)
    return str(caught.value)


@pytest.fixture
def above(tmp_path: Path) -> Path:
    """A folder with two checkpoints and a GGUF file below it."""
    folder = tmp_path / "folder"
    shutil.copytree(tiny_checkpoint(tmp_path), folder / "one")
    shutil.copytree(folder / "one", folder / "org" / "two")
    (folder / "ggufs").mkdir()
    (folder / "ggufs" / "x.gguf").touch()
    (folder / "loop").symlink_to(folder)
    return folder


def test_a_folder_above_checkpoints(above: Path) -> None:
    found = ", ".join(f"{above}/{name}" for name in ("ggufs", "one", "org/two"))
    assert refusal(above) == f"{above} holds no checkpoint: there are some in {found}; give one of these"
    assert refusal(above / "org").endswith(f"there is one in {above}/org/two; give one of these")


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "passwd").touch()
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no checkpoint: neither config.json nor a .gguf file; give a Hugging Face directory or a "
        ".gguf file"
    )
    (tmp_path / "pytorch_model.bin").touch()
    assert "it has pytorch_model.bin, but no config.json; fetch the whole checkpoint" in refusal(tmp_path)


def test_a_checkpoint_without_its_config_is_told_as_before(above: Path) -> None:
    (above / "one" / "config.json").unlink()
    assert refusal(above / "one") == f"{above}/one/config.json: No such file or directory; fetch this file"


def test_a_large_tree_takes_no_time(above: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MAX_LOOKED_AT", 3)
    assert "holds no checkpoint" in refusal(above)


@pytest.mark.slow
def test_what_build_has_made(tmp_path: Path) -> None:
    models = tmp_path / "models"
    build(BuildOptions(tiny_checkpoint(tmp_path), "m", models, max_seq_len=32))
    for path in (models, models / "m"):
        assert "it is what `build` has made; give what it was made from" in refusal(path)


def test_names_that_are_no_paths(above: Path) -> None:
    assert refusal(Path("https://huggingface.co/org/name/tree/main")).endswith("Hugging Face is named as org/name")
    assert refusal(Path("nothing")).endswith(
        "give a Hugging Face directory, a .gguf file or, to download a model, ORG/NAME"
    )
    assert refusal(above / "one" / "config.json").endswith(
        f"is one file of a checkpoint; give its directory, {above}/one"
    )


def test_a_repository_that_is_the_checkpoints_directory(above: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = above / "one"
    before = sorted(checkpoint.iterdir())
    monkeypatch.chdir(checkpoint)
    for repository in (checkpoint, Path(), above / "org" / ".." / "one", above / "loop" / "one"):
        with pytest.raises(BuildError, match="is where the checkpoint is; build into another --repository, as "):
            build(BuildOptions(checkpoint, "m", repository, max_seq_len=32))
    assert sorted(checkpoint.iterdir()) == before
