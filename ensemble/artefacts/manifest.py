"""manifest.json: what an engine's artefacts are, and what they were built from and with.

Builders write it beside the artefacts, runners read it before they load anything. This module knows file names, sizes
and versions; it knows nothing about how an artefact is made or run.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deepseek_triton.ensemble.protocol.settings import RENAMED_SETTINGS

FILE_NAME = "manifest.json"
FORMAT = 2
SMALL_FILE = 64 * 2**20  # bytes; below it a file's hash is checked at every load, above it only its size


class ManifestError(Exception):
    """The manifest is missing or unreadable, or the artefacts, target or runtime don't fit it; one line."""


class OutdatedError(ManifestError):
    """An earlier version built the model; the message has the command that rebuilds it."""


@dataclass(frozen=True)
class ArtefactFile:
    """A file beside the manifest: its length in bytes and its SHA-256."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> ArtefactFile:
        """Measure the file at `path`."""
        digest = sha256()
        with path.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
        return cls(path.stat().st_size, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """An engine's artefacts and their origin.

    spec: ModelSpec's fields, as plain values. limits: max_seq_len in tokens. versions: package → version at build time.
    requires: package → lowest version that can load the artefacts. shapes: graph tensor → its dimensions.
    command: the command line that builds these artefacts again. recipe: how an FP8 graph was quantised, else empty.
    engine: the target's own facts, such as what a TensorRT plan was compiled with and for, or a scoring graph's
    `prefix_ids`, which its prompts begin with.
    """

    name: str
    target: str
    precision: str
    checkpoint: str
    checkpoint_sha256: str
    spec: dict[str, Any]
    limits: dict[str, int]
    end_ids: tuple[int, ...]
    shapes: dict[str, list[int | str]]
    versions: dict[str, str]
    requires: dict[str, str]
    files: dict[str, ArtefactFile]
    command: str
    recipe: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def max_seq_len(self) -> int:
        """Positions in each slot's cache, in tokens."""
        return self.limits["max_seq_len"]

    def save(self, directory: Path) -> None:
        """Write manifest.json into `directory`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read `directory`'s manifest.json.

        Raises:
            OutdatedError: an earlier version wrote it.
            ManifestError: it is missing, unreadable, or lacks a field.
        """
        path = directory / FILE_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ManifestError(f"{path}: {error.strerror}; build the model again") from error
        except ValueError as error:
            raise ManifestError(f"{path} is not valid JSON; build the model again") from error
        if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
            raise OutdatedError(
                f"{path} has format {values['format']}, this version reads {FORMAT}; {_how_to_rebuild(values)}"
            )
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            odd = sorted(names ^ set(values)) if isinstance(values, dict) else []
            raise ManifestError(f"{path} has missing or unknown fields {odd}; build the model again")
        try:
            values["end_ids"] = tuple(map(int, values["end_ids"]))
            values["files"] = {name: ArtefactFile(**entry) for name, entry in values["files"].items()}
            values["limits"] = {name: int(limit) for name, limit in values["limits"].items()}
            values["limits"]["max_seq_len"]  # the one that no engine can do without
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{path} is damaged; build the model again") from error
        return cls(**values)

    def verify(self, directory: Path, installed: Mapping[str, str] | None = None) -> None:
        """Check the artefacts in `directory`, and the `installed` versions of packages, against this manifest.

        Args:
            installed: package → version; None: what is installed here.

        Raises:
            ManifestError: says what differs and how to build again.
        """
        versions = installed_versions(self.requires) if installed is None else installed
        for difference in self._differences(directory, versions):
            raise ManifestError(f"{directory}: {difference}; rebuild with: {self.command}")

    def _differences(self, directory: Path, installed: Mapping[str, str]) -> list[str]:
        found = []
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif (size := path.stat().st_size) != expected.bytes:
                found.append(f"{name} has {size} bytes, the manifest says {expected.bytes}")
            elif size <= SMALL_FILE and ArtefactFile.of(path) != expected:
                found.append(f"{name} has changed since it was built")
        for package, lowest in self.requires.items():
            found_version = installed.get(package)
            if found_version is None:
                found.append(f"{package} >= {lowest} is not installed")
            elif _release(found_version) < _release(lowest):
                found.append(f"{package} is {found_version}, the artefacts need {lowest} or later")
        return found


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Package → version, for those of `packages` that are installed here."""
    versions = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def current_command(command: str) -> str:
    """A build's command line of an earlier version, with the options that were renamed since."""
    renamed = {f"--{old}".replace("_", "-"): f"--{new}".replace("_", "-") for old, new in RENAMED_SETTINGS.items()}
    try:
        return shlex.join(renamed.get(word, word) for word in shlex.split(command))
    except ValueError:  # an open quote
        return command


def _how_to_rebuild(values: Mapping[str, Any]) -> str:
    command = values.get("command")
    return f"rebuild with: {current_command(command)}" if command and isinstance(command, str) else "build it again"


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, ending zeros left out: "1.32.0+cpu" → (1, 32)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
