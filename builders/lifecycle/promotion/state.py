"""What a promotion has done so far: one file beside the repository, from which a killed one goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.ensemble.artefacts.atomic_file import write_atomically

RUNNING, PROMOTED, ROLLED_BACK = "running", "promoted", "rolled back"
ROLLING_BACK = "rolling back"  # the old model answers, the new one may still be loaded


@dataclass(frozen=True)
class Promotion:
    """The last promotion of a name.

    old, new: the models that answered before, and that shall. candidate_sha256: of the candidate's tensors. share: of
    the candidate, in percent, that was set last. status: one of the four above. why: of a rollback.
    """

    name: str
    old: str
    new: str
    candidate_sha256: str
    status: str = RUNNING
    share: float = 0.0
    why: str = ""


class PromotionFile:
    """Where the last promotion of a name in a repository is kept."""

    def __init__(self, repository: Path, name: str) -> None:
        resolved = repository.resolve()
        self.path = resolved.parent / f".{resolved.name}-{name}.promotion.json"

    def load(self) -> Promotion | None:
        """The last one; None: there was none.

        Raises:
            BuildError: the file is damaged.
        """
        try:
            return Promotion(**json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise BuildError(f"{self.path} is damaged; see what the route file says, and remove it") from error

    def save(self, promotion: Promotion, **changes: object) -> Promotion:
        """Write it with `changes`, and return it."""
        promotion = replace(promotion, **changes)  # type: ignore[arg-type]
        write_atomically(self.path, (json.dumps(asdict(promotion), indent=1) + "\n").encode(), BuildError)
        return promotion

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others out; the kernel frees the lock when the process ends, however it ends.

        Raises:
            BuildError: another process promotes the name, or rolls it back.
        """
        try:
            lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise BuildError(f"{error.filename}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BuildError(
                    "another process promotes this name; end it first: its shares stay as they are"
                ) from error
            yield
        finally:
            os.close(lock)
