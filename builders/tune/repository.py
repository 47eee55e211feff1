"""Reads a model's configurations from a repository, copies the model with others, and writes the winner's.

A copy shares the artefacts with the original; only its config.pbtxt files are its own. The winner's configurations are
several files, which can't be replaced atomically. So all changes are first written to one record file, from which the
next run finishes the changes if a run is killed. This module starts nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek_triton.builders.repository.check import CONFIG, require_sound
from deepseek_triton.builders.repository.models.config_text import is_edited
from deepseek_triton.builders.repository.pbtxt import PbtxtError, parse_text, to_text
from deepseek_triton.builders.tune.options import TuneError
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically
from deepseek_triton.ensemble.processes.temp_dirs import temporary_directory

COPIES = "deepseek-triton-tune-"  # prefix of the copies' directory names
# The record's name, by the command that writes; it lies in the repository, where Triton looks at directories only.
PENDING = ".{}.tuned.json"
RECORDS = {"tune": PENDING, "configure": ".{}.configured.json"}


def read_configs(repository: Path, name: str) -> dict[str, ModelConfig]:
    """Return the configurations of ensemble `name` and of its models, by name.

    Raises:
        TuneError: there is no such ensemble, or a configuration can't be read.
    """
    ensemble = _read(repository, name)
    if ensemble.platform != "ensemble":
        raise TuneError(f"{name} is no ensemble: tune the model that clients ask for")
    parts = (step.model_name for step in ensemble.ensemble_scheduling.step)
    return {name: ensemble, **{part: _read(repository, part) for part in parts}}


@contextlib.contextmanager
def copied(repository: Path, configs: Mapping[str, ModelConfig]) -> Iterator[Path]:
    """Make a temporary, checked repository of these models only; a context manager.

    Raises:
        CheckError: the models can't be served with these configurations.
    """
    with temporary_directory(COPIES) as directory:
        copy = directory / "models"
        try:
            for name, config in configs.items():
                _copy(repository, name, config, copy)
        except OSError as error:
            raise TuneError(f"{error.filename or directory}: {error.strerror}; set TMPDIR to another disk") from error
        require_sound(copy)
        yield copy


def put_configs(repository: Path, configs: Mapping[str, ModelConfig]) -> list[Path]:
    """Write all configurations into the repository, or none of them; returns the files that changed.

    Raises:
        CheckError: the repository couldn't be served with them. TuneError: a file can't be written.
    """
    with copied(repository, configs):
        pass  # checked as a whole
    texts = {}
    for name, config in configs.items():
        before = (repository / name / CONFIG).read_text(encoding="utf-8")
        texts[f"{name}/{CONFIG}"] = to_text(config, is_edited=is_edited(before))
    return put_files(repository, next(iter(configs)), texts, "tune")


def put_files(repository: Path, name: str, texts: Mapping[str, str], command: str) -> list[Path]:
    """Write the files of model `name`, path in the repository → text, all or none; returns those that changed.

    command: which of RECORDS.

    Raises:
        TuneError: a file can't be written.
    """
    changes = {}
    for path, after in texts.items():
        before = (repository / path).read_text(encoding="utf-8")
        if before != after:
            changes[path] = {"before": before, "after": after}
    if changes:
        record = repository / RECORDS[command].format(name)
        write_atomically(record, json.dumps(changes).encode(), TuneError)
        try:
            _apply(repository, changes, "after")
        except BaseException:
            _apply(repository, changes, "before")
            record.unlink()
            raise
        record.unlink()
    return [repository / path for path in changes]


def finish_pending(repository: Path, command: str = "tune") -> list[str]:
    """Finish the writes of killed runs of `command`, and return the models' names; models changed since are skipped.

    Raises:
        TuneError: a file can't be written.
    """
    finished: list[str] = []
    for record in repository.glob(RECORDS[command].format("*")):
        try:
            changes = json.loads(record.read_text(encoding="utf-8"))
            texts = {path: (repository / path).read_text(encoding="utf-8") for path in changes}
            if all(texts[path] in (change["before"], change["after"]) for path, change in changes.items()):
                _apply(repository, changes, "after")
                finished.extend(dict.fromkeys(Path(path).parts[0] for path in changes))
            record.unlink()
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"can't be finished: {error}; remove it, then build the model again or tune it"
            raise TuneError(f"{record} {what}") from error
    return finished


def _apply(repository: Path, changes: Mapping[str, Mapping[str, str]], which: str) -> None:
    for path, change in changes.items():
        write_atomically(repository / path, change[which].encode(), TuneError)


def newest_version(directory: Path) -> Path:
    """Return the directory of the newest version, which Triton serves."""
    versions = _versions(directory) if directory.is_dir() else []
    if not versions:
        raise TuneError(f"{directory} has no version: build the model first")
    return max(versions, key=lambda path: int(path.name))


def _copy(repository: Path, name: str, config: ModelConfig, copy: Path) -> None:
    (copy / name).mkdir(parents=True)
    (copy / name / CONFIG).write_text(to_text(config), encoding="utf-8")
    for version in _versions(repository / name):
        (copy / name / version.name).mkdir()
        for file in version.iterdir():
            _share(file, copy / name / version.name / file.name)


def _versions(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir() and path.name.isdecimal()]


def _share(source: Path, target: Path) -> None:
    """Hard-link a file, so that checks see a regular file; make a symbolic link if the copy is on another disk."""
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source.resolve())


def _read(repository: Path, name: str) -> ModelConfig:
    path = repository / name / CONFIG
    try:
        return parse_text(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise TuneError(f"{path}: {error.strerror}; {_there_are(repository)}") from error


def _there_are(repository: Path) -> str:
    if not repository.is_dir():
        return "build the model first, or name another --repository"
    with contextlib.suppress(PbtxtError):
        names = [path.parent.name for path in sorted(repository.glob(f"*/{CONFIG}")) if _is_served(path)]
        return (
            f"the repository's models are {', '.join(names)}" if names else "the repository holds no model: build one"
        )
    return "name a model of the repository"


def _is_served(path: Path) -> bool:
    return bool(parse_text(path.read_text(encoding="utf-8"), path).platform == "ensemble")
