"""A model's parts in a repository: read, copied with other configurations, and given those of the winner.

A copy shares the artefacts with the original; only its config.pbtxt files are its own. It starts nothing.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from builders.check import CONFIG, require_sound
from builders.files import write_atomically
from builders.pbtxt import parse_text, to_text
from builders.tune.space import TuneError


def read_configs(repository: Path, name: str) -> dict[str, ModelConfig]:
    """The configurations of ensemble `name` and of the models that it is made of, by their names.

    Raises:
        TuneError: there is no such ensemble, or a part of it can't be read.
    """
    ensemble = _read(repository, name)
    if ensemble.platform != "ensemble":
        raise TuneError(f"{name} is no ensemble: tune the model that clients ask for")
    parts = (step.model_name for step in ensemble.ensemble_scheduling.step)
    return {name: ensemble, **{part: _read(repository, part) for part in parts}}


@contextlib.contextmanager
def copied(repository: Path, configs: Mapping[str, ModelConfig]) -> Iterator[Path]:
    """A sound repository of these models alone, for as long as it is needed.

    Raises:
        CheckError: with these configurations it can't be served.
    """
    with tempfile.TemporaryDirectory(prefix="deepseek-triton-tune-") as directory:
        copy = Path(directory) / "models"
        for name, config in configs.items():
            (copy / name).mkdir(parents=True)
            (copy / name / CONFIG).write_text(to_text(config), encoding="utf-8")
            for version in _versions(repository / name):
                (copy / name / version.name).mkdir()
                for file in version.iterdir():
                    _share(file, copy / name / version.name / file.name)
        require_sound(copy)
        yield copy


def put_configs(repository: Path, configs: Mapping[str, ModelConfig]) -> list[Path]:
    """Write the configurations into the repository: all of them or none; gives the files that have changed.

    Raises:
        CheckError: the repository couldn't be served with them. TuneError: a file can't be written.
    """
    with copied(repository, configs):
        pass  # checked as a whole
    changed: list[Path] = []
    with contextlib.ExitStack() as undo:
        for name, config in configs.items():
            path = repository / name / CONFIG
            before, after = path.read_bytes(), to_text(config).encode()
            if before == after:
                continue
            undo.callback(path.write_bytes, before)
            write_atomically(path, after, TuneError)
            changed.append(path)
        undo.pop_all()
    return changed


def newest_version(directory: Path) -> Path:
    """The version that Triton serves."""
    versions = _versions(directory)
    if not versions:
        raise TuneError(f"{directory} has no version: build the model first")
    return max(versions, key=lambda path: int(path.name))


def _versions(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir() and path.name.isdecimal()]


def _share(source: Path, target: Path) -> None:
    """Hard links look like files to every check; where the copy lies on another disk, a symbolic link does."""
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source.resolve())


def _read(repository: Path, name: str) -> ModelConfig:
    path = repository / name / CONFIG
    try:
        return parse_text(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise TuneError(f"{path}: {error.strerror}; name a model of the repository") from error
