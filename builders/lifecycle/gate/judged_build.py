"""The build that the gate judges: made like the model that serves, beside it, and removed if it doesn't pass.

A file beside the repository names the build, so that a killed gate goes on with it and another candidate's is removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.promotion.route import answering, next_name
from deepseek_triton.builders.repository.models.built import CONFIG, BuiltModel
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically


@dataclass(frozen=True)
class JudgedBuild:
    """name: of the build. identity: of its manifest. base, base_identity: of the model that answered meanwhile."""

    name: str
    identity: str
    base: str
    base_identity: str


@dataclass(frozen=True)
class _Note:
    """new: the build's name. base, base_identity: as `JudgedBuild`. candidate_sha256: of the candidate's tensors."""

    new: str
    base: str
    base_identity: str
    candidate_sha256: str
    has_passed: bool = False


class BuildOfGate:
    """The place of one name's judged build in a repository. routes: the gateway's route file, if there is one."""

    def __init__(self, repository: Path, name: str, routes: Path | None) -> None:
        resolved = repository.resolve()
        self._repository, self._name, self._routes = repository, name, routes
        self._note = resolved.parent / f".{resolved.name}-{name}.gate.json"

    def make(
        self, candidate_sha256: str, build_as: Callable[[str, str], None], say: Callable[[str], None]
    ) -> JudgedBuild:
        """Build the candidate as what answers the name is built, unless a killed gate did.

        Raises:
            BuildError: nothing or more than one model answers the name, or the build failed.
        """
        base = answering(self._repository, self._name, self._routes)
        base_identity = identity_of(self._repository, base)
        wanted = _Note("", base, base_identity, candidate_sha256)
        last = self._load()
        if last is not None and replace(last, new="", has_passed=False) == wanted:
            new = last.new
        else:
            if last is not None and not last.has_passed:
                self._remove(last.new)
            new = next_name(self._repository, self._name)
        self._save(replace(wanted, new=new))
        if not (self._repository / new / CONFIG).exists():  # which a build writes last
            say(f"building {new} as {base} is built")
            build_as(base, new)
        return JudgedBuild(new, identity_of(self._repository, new), base, base_identity)

    def settle(self, *, has_passed: bool) -> None:
        """Keep the build that passed; remove the one that didn't."""
        note = self._load()
        if note is not None and has_passed:
            self._save(replace(note, has_passed=True))
        elif note is not None:
            self._remove(note.new)
            self._note.unlink()

    def _remove(self, name: str) -> None:
        """The ensemble first: a server never meets one without its parts."""
        if not (self._repository / name / CONFIG).exists():
            return
        for part in BuiltModel.read(self._repository, name).texts:
            shutil.rmtree(self._repository / part, ignore_errors=True)

    def _load(self) -> _Note | None:
        try:
            return _Note(**json.loads(self._note.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise BuildError(f"{self._note} is damaged; remove it") from error

    def _save(self, note: _Note) -> None:
        write_atomically(self._note, (json.dumps(asdict(note), indent=1) + "\n").encode(), BuildError)


def identity_of(repository: Path, name: str) -> str:
    """The identity of the newest version of `name`.

    Raises:
        BuildError: there is no such model, or it can't be read.
    """
    return BuiltModel.read(repository, name).manifest.identity
