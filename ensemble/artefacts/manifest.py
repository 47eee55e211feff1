"""manifest.json: what an engine's artefacts are, and what they were built from and with.

Builders write it beside the artefacts, runners read it before they load anything. This module knows file names, sizes
and versions; it knows nothing about how an artefact is made or run.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deepseek_triton.ensemble.artefacts.rebuild_command import at_repository
from deepseek_triton.ensemble.protocol.pipelines import ENGINE_SUFFIX, TOKENIZER_SUFFIX, model_name
from deepseek_triton.ensemble.protocol.settings import RENAMED_SETTINGS

FILE_NAME = "manifest.json"
FORMAT = 2
SMALL_FILE = 64 * 2**20  # bytes; up to it a file's hash is checked at every load, above it that of a sample
SAMPLE_BLOCKS = 64
SAMPLE_BYTES = 65_536  # of one block


class ManifestError(Exception):
    """The manifest is missing or unreadable, or the artefacts, target or runtime don't fit it; one line."""


class OutdatedError(ManifestError):
    """An earlier version built the model; the message has the command that rebuilds it."""


@dataclass(frozen=True)
class ArtefactFile:
    """A file beside the manifest: its length in bytes, its SHA-256, and that of its sample.

    sample: of SAMPLE_BLOCKS blocks spread over the file, which a load can afford to read; empty: unknown.
    """

    bytes: int
    sha256: str
    sample: str = field(default="", compare=False)

    @classmethod
    def of(cls, path: Path) -> ArtefactFile:
        """Measure the file at `path`."""
        digest = sha256()
        with path.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
        return cls.known(path, digest.hexdigest())

    @classmethod
    def known(cls, path: Path, sha256: str) -> ArtefactFile:
        """Describe the file at `path`, whose SHA-256 was computed while it was written."""
        return cls(path.stat().st_size, sha256, sample_of(path))


@dataclass(frozen=True)
class Manifest:
    """An engine's artefacts and their origin.

    spec: ModelSpec's fields, as plain values. limits: max_seq_len in tokens. versions: package → version at build time.
    requires: package → lowest version that can load the artefacts. shapes: graph tensor → its dimensions.
    command: the command line that builds these artefacts again, into the repository where they lie when it is read.
    recipe: how an FP8 graph was quantised, else empty.
    adapter: the name, the base and the SHA-256 of a LoRA adapter that was merged into the weights, else empty.
    provenance: the checkpoint's parent, and the step that made the one from the other, else empty.
    engine: the target's own facts, such as what a TensorRT plan was compiled with and for, or a scoring graph's
    `prefix_ids`, which its prompts begin with. sampling: request option → the value that the checkpoint proposes for
    requests that leave it out.
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
    adapter: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def max_seq_len(self) -> int:
        """Positions in each slot's cache, in tokens."""
        return self.limits["max_seq_len"]

    @property
    def identity(self) -> str:
        """A digest of all but the command, which changes with the settings: equal for the same build alone."""
        return sha256(replace(self, command="").to_json().encode()).hexdigest()[:32]

    def save(self, directory: Path) -> None:
        """Write manifest.json into `directory`."""
        (directory / FILE_NAME).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

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
        if isinstance(values, dict):
            for name in ("adapter", "sampling", "provenance"):  # which the first manifests of this format don't have
                values.setdefault(name, {})
        if not isinstance(values, dict) or set(values) != names:
            odd = sorted(names ^ set(values)) if isinstance(values, dict) else []
            raise ManifestError(f"{path} has missing or unknown fields {odd}; build the model again")
        try:
            values["end_ids"] = tuple(map(int, values["end_ids"]))
            values["files"] = {name: ArtefactFile(**entry) for name, entry in values["files"].items()}
            values["limits"] = {name: int(limit) for name, limit in values["limits"].items()}
            values["sampling"] = {str(name): value + 0 for name, value in values["sampling"].items()}
            values["limits"]["max_seq_len"]  # the one that no engine can do without
            values["command"] = at_repository(values["command"], directory)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"{path} is damaged; build the model again") from error
        return cls(**values)

    def verify(self, directory: Path, installed: Mapping[str, str] | None = None, *, is_whole: bool = False) -> None:
        """Check the artefacts in `directory`, and the `installed` versions of packages, against this manifest.

        Of a file above SMALL_FILE bytes a sample is read, unless `is_whole`.

        Args:
            installed: package → version; None: what is installed here.

        Raises:
            ManifestError: says what differs and how to build again.
        """
        versions = installed_versions(self.requires) if installed is None else installed
        for difference in self._differences(directory, versions, is_whole):
            raise ManifestError(f"{directory}: {difference}; rebuild with: {self.command}")

    def _differences(self, directory: Path, installed: Mapping[str, str], is_whole: bool) -> list[str]:
        found = []
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif (size := path.stat().st_size) != expected.bytes:
                found.append(f"{name} has {size} bytes, the manifest says {expected.bytes}")
            elif size <= SMALL_FILE or is_whole:
                if ArtefactFile.of(path) != expected:
                    found.append(f"{name} has changed since it was built")
            elif expected.sample and sample_of(path) != expected.sample:
                found.append(f"{name} has changed since it was built")
        for package, lowest in self.requires.items():
            found_version = installed.get(package)
            if found_version is None:
                found.append(f"{package} >= {lowest} is not installed")
            elif _release(found_version) < _release(lowest):
                found.append(f"{package} is {found_version}, the artefacts need {lowest} or later")
        return found


def loaded_identity(arguments: Mapping[str, str]) -> str:
    """The identity of the build that a tokenizer belongs to; empty if its manifest can't be read.

    Args:
        arguments: what Triton gives the tokenizer's `initialize`.
    """
    served_name = arguments["model_name"].removesuffix(f"-{TOKENIZER_SUFFIX}")
    engine = Path(arguments["model_repository"]).parent / model_name(served_name, ENGINE_SUFFIX)
    try:
        return Manifest.load(engine / arguments["model_version"]).identity
    except ManifestError:
        return ""


def sample_of(path: Path) -> str:
    """The SHA-256 of SAMPLE_BLOCKS blocks at equal distances, the file's first and last among them."""
    size, digest = path.stat().st_size, sha256()
    last = max(0, size - SAMPLE_BYTES)
    with path.open("rb") as stream:
        for number in range(SAMPLE_BLOCKS):
            stream.seek(last * number // (SAMPLE_BLOCKS - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


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
