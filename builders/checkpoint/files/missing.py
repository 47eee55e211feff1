"""A file that isn't there, or isn't yet what it should be: why, and how to get it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from deepseek_triton.builders.checkpoint.files.hub_cache import Snapshot
from deepseek_triton.builders.errors import CheckpointError

FETCH_AGAIN = "fetch the checkpoint again"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[BinaryIO]:
    """Open a checkpoint's file for reading.

    Raises:
        CheckpointError: it is not there, can't be read, or stands for another that was not downloaded.
    """
    try:
        stream = file.open("rb")
    except FileNotFoundError as error:
        raise CheckpointError(reason_missing(file)) from error
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}; make it readable") from error
    with stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(
                f"{file} is a git-lfs pointer, not the file that it stands for; run: git -C {file.parent} lfs pull"
            )
        stream.seek(0)
        yield stream


def reason_missing(file: Path) -> str:
    """Why there is no `file`, and what to do, in one line."""
    snapshot = Snapshot.of(file.parent)
    if snapshot is not None:
        why = "is a link to a blob that is not there" if file.is_symlink() else "is not in the snapshot"
        left = " (its download was interrupted)" if snapshot.has_interrupted_download() else ""
        return f"{file} {why}{left}: the snapshot is incomplete; complete it with: {snapshot.download_command()}"
    if file.is_symlink():
        return f"{file} is a link to {file.readlink()}, which is not there; copy the files that the links stand for"
    partial = file.parent / ".cache" / "huggingface" / "download"
    if any(partial.glob("*.incomplete")):
        return f"{file}: No such file or directory; its download was interrupted: run the same hf download again"
    return f"{file}: No such file or directory; fetch this file"
