"""Where a checkpoint that a step of the lifecycle wrote comes from: a file beside its weights.

A build copies it into the engine's manifest, so that a served model knows its parent. Every step (prune, recover, …)
writes the same file; a parent's own provenance is kept inside, so that the chain goes back to the first checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import CheckpointError

FILE_NAME = "provenance.json"
FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """The step that made a checkpoint, and what it was made from.

    step: the command's name. parent: the parent's name. parent_sha256: of the parent's tensors, as
    `checkpoint_sha256` of a manifest: name, dtype, shape and bytes of each in the order of `ModelSpec.tensor_shapes`.
    settings: what the step was told. data: name of each text or data set → its SHA-256. origin: the parent's own
    provenance, None for a checkpoint that no step made.
    """

    step: str
    parent: str
    parent_sha256: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Any] | None = None

    def save(self, directory: Path) -> None:
        """Write provenance.json into `directory`."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"
        (directory / FILE_NAME).write_text(text, encoding="utf-8")


def provenance_of(checkpoint: Path) -> dict[str, Any]:
    """What `checkpoint`'s provenance.json holds; empty for a checkpoint that has none.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    path = checkpoint / FILE_NAME
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: remove it, or make the checkpoint again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path} has no format {FORMAT}: another version wrote it; make the checkpoint again")
    return {key: value for key, value in values.items() if key != "format"}
