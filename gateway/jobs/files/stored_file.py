"""StoredFile: what is known of a file beside its bytes; and why a file isn't taken."""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import asdict, dataclass
from typing import Any

ID = re.compile(r"file-[0-9a-f]{32}")  # nothing else becomes a part of a path


class FilesFullError(Exception):
    """The file, or all files together, would be larger than they may."""

    def __init__(self, message: str, *, is_own_size: bool = False) -> None:
        super().__init__(message)
        self.is_own_size = is_own_size  # this file is too large, whatever else is kept


class FilesError(Exception):
    """The directory can't be used now."""


@dataclass(frozen=True)
class StoredFile:
    """Times are seconds since 1970; filename: the client's; it is told, and never part of a path."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int

    @classmethod
    def from_json(cls, text: str) -> StoredFile:
        """The one that `to_json` has written."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self))

    @property
    def is_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires_at <= time.time()

    def form(self) -> dict[str, Any]:
        """The file as OpenAI's API tells it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


def new_id() -> str:
    """An id of a file; a later one sorts behind."""
    return f"file-{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
