"""Remove old versions of a model: all but the newest ones and those that a server has loaded."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.models.built import BuiltModel
from deepseek_triton.builders.repository.staging import size_of


@dataclass(frozen=True)
class Removal:
    """One version of one model, and the bytes that it takes on the disk."""

    model: str
    version: int
    num_bytes: int


def removals(model: BuiltModel, keep: int, served: Collection[int]) -> list[Removal]:
    """The versions to remove: neither among the newest `keep` nor `served`.

    Raises:
        BuildError: `keep` is less than 1.
    """
    if keep < 1:
        raise BuildError(f"keep is {keep}, must be at least 1: without a version a model can't be served")
    kept = {*model.versions[-keep:], *served}
    return [
        Removal(model.name, version, sum(map(size_of, model.part_dirs(version))))
        for version in model.versions
        if version not in kept
    ]


def remove(model: BuiltModel, removal: Removal) -> None:
    """Remove the version of every part, the ensemble's first: it never names a version that isn't there.

    Raises:
        BuildError: it can't be removed.
    """
    for directory in model.part_dirs(removal.version):
        try:
            shutil.rmtree(directory)
        except OSError as error:
            raise BuildError(
                f"{error.filename or directory}: {error.strerror}; correct this and prune again"
            ) from error
