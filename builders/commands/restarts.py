"""What `serve` serves after a crash: what it served before, whatever was built or configured meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_triton.ensemble.server.served_state import ServedState


class SameAgain:
    """Lets a server that starts again serve what it served before.

    directory: where a repository as it was is made, if the one that is served has changed.
    """

    def __init__(self, repository: Path, directory: Path, say: Callable[[str], None]) -> None:
        self._repository = repository
        self._state = ServedState.of(repository)
        self._directory = directory
        self._say = say

    def prepare(self, server: Any) -> None:
        """Point `server` to what it is to serve; called before each restart."""
        server.repository = self._repository
        if not (differences := self._state.differences()):
            return
        changed = "; ".join(differences)
        if not self._state.is_whole():
            self._say(f"what was served before is gone, so the newest is served: {changed}")
            return
        server.repository = self._state.restore(self._directory)
        self._say(f"serving what was served before; end and start `serve` to serve what is new: {changed}")
