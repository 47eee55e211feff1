"""Pseudonyms: keys and users are kept as keyed hashes, which nobody reverses who has the lines alone."""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

SECRET = "secret"
ANONYMOUS = "anonymous"  # the owner where the gateway asks for no keys


class Pseudonyms:
    """Those of one collection; its secret lies beside the files, for its user alone to read. Raises `OSError`."""

    def __init__(self, directory: Path) -> None:
        self._secret = _secret(directory / SECRET)

    def owner(self, key_id: str) -> str:
        """The one who has the key with this id; no id: nobody in particular."""
        return self._hash("key", key_id) if key_id else ANONYMOUS

    def user(self, name: str) -> str:
        """A user as a request names it, whatever key it comes with; no name: none."""
        return self._hash("user", name) if name else ""

    def _hash(self, kind: str, text: str) -> str:
        return hmac.digest(self._secret, f"{kind}\0{text}".encode("utf-8", "surrogatepass"), "sha256").hex()[:32]


def _secret(path: Path) -> bytes:
    """The secret; the first process to come makes it, as a whole."""
    if not path.exists():
        made = path.with_name(f".{SECRET}-{os.getpid()}-{secrets.token_hex(4)}")
        made.touch(mode=0o600)
        made.write_bytes(secrets.token_bytes(32))
        try:
            os.link(made, path)
        except FileExistsError:
            pass
        finally:
            made.unlink()
    return path.read_bytes()
