"""FileKeys: keys in a JSON file that is replaced as a whole, and read again when it has changed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deepseek_triton.gateway.protection.keys.api_key import ApiKey
from deepseek_triton.gateway.protection.keys.store import KeyStoreError

log = logging.getLogger(__name__)

# What tells one state of the file from another: its device, inode, size and time.
Version = tuple[int, int, int, int]


class FileKeys:
    """A `KeyStore` in the file at `path`; the first `add` makes it, and there is no key until then.

    While a changed file can't be read, the keys that were read last hold, and the log says so.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._keys: dict[str, ApiKey] | None = None
        self._version: Version | None = None

    async def find(self, key_id: str) -> ApiKey | None:
        """The key with this id. Looking whether the file has changed takes microseconds."""
        return self._current().get(key_id)

    async def all(self) -> tuple[ApiKey, ...]:
        """All keys, the oldest first."""
        return tuple(self._current().values())

    async def add(self, key: ApiKey) -> None:
        """Keep one more; `all` shows it last."""
        await self.replace(key)

    async def replace(self, key: ApiKey) -> None:
        """Keep `key` instead of the one with its id."""
        with self._locked():
            self._write({**(self._read() if self._path.exists() else {}), key.id: key})

    async def close(self) -> None:
        """Nothing is open."""

    def _current(self) -> dict[str, ApiKey]:
        try:
            version = _version(self._path.stat())
            if self._keys is None or version != self._version:
                self._keys, self._version = self._read(), version
        except (KeyStoreError, OSError) as error:
            if self._keys is None and isinstance(error, FileNotFoundError):
                return {}
            if self._keys is None:
                raise KeyStoreError(str(error)) from error
            log.error("the keys that were read last still hold: %s", error)
        return self._keys

    def _read(self) -> dict[str, ApiKey]:
        try:
            forms = json.loads(self._path.read_text(encoding="utf-8"))["keys"]
            return {key.id: key for key in map(ApiKey.from_form, forms)}
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise KeyStoreError(f"the keys in {self._path} can't be read: {error}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.with_name(f"{self._path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise KeyStoreError(f"the keys in {self._path} can't be written: {error}") from error

    def _write(self, keys: dict[str, ApiKey]) -> None:
        """Replace the file: a reader, or a power cut, meets the old one or the new one."""
        text = json.dumps({"keys": [key.to_form() for key in keys.values()]}, indent=2)
        path = self._path.resolve()  # a link stays one
        # mkstemp's files are their user's alone.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _version(status: os.stat_result) -> Version:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
