"""Seals what one process of a served model writes for another, so that no client can write it.

Triton lets anybody call the models inside an ensemble. A sealed text begins with a code that only who has the model's
key can compute. The key is made when the first of the model's processes starts, and lies in a file of this user's own.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from hashlib import blake2b
from pathlib import Path

from deepseek_triton.ensemble.processes.watchdog import meeting_point

KEY_BYTES = 32
CODE_BYTES = 16


class SealError(ValueError):
    """A text isn't sealed with the model's key."""


class Seal:
    """Seals and opens texts with one key [KEY_BYTES]."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def close(self, text: bytes, beside: bytes = b"") -> bytes:
        """Return `text` with its code before it; the code holds for `beside` too, which travels apart."""
        return self._code(text, beside) + text

    def open(self, sealed: bytes, beside: bytes = b"") -> bytes:
        """Return the text of what `close` returned.

        Raises:
            SealError: it is something else.
        """
        code, text = sealed[: 2 * CODE_BYTES], sealed[2 * CODE_BYTES :]
        if not hmac.compare_digest(code, self._code(text, beside)):
            raise SealError("it isn't sealed by this server")
        return text

    def _code(self, text: bytes, beside: bytes) -> bytes:
        digest = blake2b(len(beside).to_bytes(8, "little"), key=self._key, digest_size=CODE_BYTES)
        digest.update(beside)
        digest.update(text)
        return digest.hexdigest().encode()


def model_seal(name: str, version: str | int, server_pid: int | None = None) -> Seal:
    """The seal of version `version` of the served model `name` under this process's server.

    Raises:
        OSError: the key can't be written or read.
    """
    path = meeting_point(name, version, "key", server_pid)
    if not path.exists():
        _make_key(path)
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise OSError(f"{path} holds {len(key)} bytes, must hold {KEY_BYTES}; remove it")
    return Seal(key)


def _make_key(path: Path) -> None:
    """Write a new key, unless another process does so first."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.touch(mode=0o600)
        part.write_bytes(secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
