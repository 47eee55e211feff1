"""FileStore: files in a directory, which several gateways may share. It knows neither HTTP nor what is in a file.

    id                      the directory's own id, by which gateways see whether they share it
    files/OWNER/ID          a file's bytes; OWNER is a digest
    files/OWNER/ID.json     what else is known of it; a file exists once this does
    files/OWNER/ID.TOKEN.part   an upload that isn't complete
    batches/ID/             what a batch that runs reads and writes (`gateway.jobs.batches`)

All calls read or write the disk: they belong on a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from deepseek_triton.gateway.jobs.files.stored_file import ID, FilesError, FilesFullError, StoredFile, new_id

CHECK_BYTES = 8 << 20  # an upload looks at the sums after so many bytes, and at its end
MAX_FILES = 10_000  # of one owner
ABANDONED_S = 3600.0  # without a change, until what a killed process left is removed


@dataclass(frozen=True)
class FileLimits:
    """Bytes of one file, of one owner's, and of everything in the directory. keep_s: how long a file is kept."""

    max_file: int = 200 << 20
    max_of_owner: int = 4 << 30
    max_in_all: int = 16 << 30
    keep_s: float = 30 * 86400.0


class FileStore:
    """The files in `directory`, which is made when the first one comes. Every method raises `FilesError`."""

    def __init__(self, directory: Path, limits: FileLimits) -> None:
        self.directory, self.limits = directory, limits

    def id(self) -> str:
        """The directory's id; "": it isn't there yet."""
        try:
            return (self.directory / "id").read_text(encoding="ascii")
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise _unusable(error) from error

    def make(self) -> str:
        """Make the directory if it isn't there; its id."""
        with _told():
            for name in ("files", "batches"):
                (self.directory / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self.directory / "id"
            if not path.exists():
                own = self.directory / f"id.{secrets.token_hex(8)}"
                own.write_text(secrets.token_hex(16), encoding="ascii")
                share(own, path)
                own.unlink(missing_ok=True)
        return self.id()

    def create(self, owner: str) -> FileWriter:
        """Begin a file. Raises `FilesFullError`."""
        self.make()
        with _told():
            folder = self._folder(owner)
            folder.mkdir(mode=0o700, exist_ok=True)
            self.check_room(owner)
            if len(self.ids(owner)) >= MAX_FILES:
                raise FilesFullError(f"this key has {MAX_FILES} files, as many as it may")
            return FileWriter(self, owner, folder)

    def new(self, filename: str, purpose: str, num_bytes: int, expires_s: float | None = None) -> StoredFile:
        """What will be known of a file that is made now. expires_s: seconds; None: as long as it may be kept."""
        now = int(time.time())
        keep_s = min(expires_s or self.limits.keep_s, self.limits.keep_s)
        return StoredFile(new_id(), filename, purpose, num_bytes, now, now + int(keep_s))

    def put(self, owner: str, file: StoredFile, written: Path) -> None:
        """Make `written`, a whole file in this directory, the one that `file` tells of; again is the same."""
        with _told():
            folder = self._folder(owner)
            folder.mkdir(mode=0o700, exist_ok=True)
            publish(folder, file, written)

    def find(self, owner: str, file_id: str) -> StoredFile | None:
        """The file, if it is there, of this owner."""
        if not ID.fullmatch(file_id):
            return None
        try:
            file = StoredFile.from_json((self._folder(owner) / f"{file_id}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(error) from error
        return None if file.is_expired else file

    def path(self, owner: str, file: StoredFile) -> Path:
        """Where its bytes are."""
        return self._folder(owner) / file.id

    def ids(self, owner: str) -> list[str]:
        """All of an owner's files, the oldest first."""
        with _told():
            return sorted(path.stem for path in self._folder(owner).glob("file-*.json"))

    def delete(self, owner: str, file_id: str) -> bool:
        """Remove a file; False: it isn't there. What reads it goes on."""
        if self.find(owner, file_id) is None:
            return False
        with _told():
            _remove(self._folder(owner) / file_id)
        return True

    def check_room(self, owner: str, more: int = 0) -> None:
        """Raise `FilesFullError` where `more` bytes are too many."""
        with _told():
            own = _num_bytes(self._folder(owner))
            if own + more > self.limits.max_of_owner:
                raise FilesFullError(f"this key's files have {own} bytes; {self.limits.max_of_owner} are allowed")
            total = _num_bytes(self.directory)
            if total + more > self.limits.max_in_all:
                raise FilesFullError("the files of all keys together have as many bytes as they may; retry later")

    def num_bytes(self) -> int:
        """Of everything in the directory."""
        with _told():
            return _num_bytes(self.directory)

    def work(self, batch_id: str) -> Path:
        """The folder of a batch that runs."""
        return self.directory / "batches" / batch_id

    def sweep(self, running: set[str]) -> None:
        """Remove what has expired, what killed uploads left, and the folders of batches that aren't `running`."""
        with _told():
            for path in list((self.directory / "files").glob("*/file-*")):
                if path.suffix == ".json":
                    with contextlib.suppress(FileNotFoundError):
                        if StoredFile.from_json(path.read_text(encoding="utf-8")).is_expired:
                            _remove(path.with_suffix(""))
                elif not path.with_suffix(".json").exists() and _is_abandoned(path):
                    path.unlink(missing_ok=True)
            for folder in list((self.directory / "batches").glob("batch_*")):
                if folder.name not in running and _is_abandoned(folder):
                    shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, owner: str) -> Path:
        return self.directory / "files" / hashlib.sha256(owner.encode()).hexdigest()[:32]


class FileWriter:
    """A file that is being written; `commit` or `abandon` ends it."""

    def __init__(self, store: FileStore, owner: str, folder: Path) -> None:
        self._store, self._owner, self._folder = store, owner, folder
        self._path = folder / f"{new_id()}.{secrets.token_hex(8)}.part"
        self._stream: BinaryIO = self._path.open("xb")
        self._num_bytes = self._num_checked = 0

    def write(self, data: bytes) -> None:
        """Add bytes. Raises `FilesFullError`."""
        self._num_bytes += len(data)
        if self._num_bytes > self._store.limits.max_file:
            message = f"a file may have {self._store.limits.max_file} bytes at most"
            raise FilesFullError(message, is_own_size=True)
        with _told():
            self._stream.write(data)
        if self._num_bytes - self._num_checked >= CHECK_BYTES:
            self._check()

    def commit(self, filename: str, purpose: str, expires_s: float | None) -> StoredFile:
        """Keep it. Raises `FilesFullError`."""
        self._check()
        file = self._store.new(filename, purpose, self._num_bytes, expires_s)
        with _told():
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            publish(self._folder, file, self._path)
        return file

    def abandon(self) -> None:
        """Remove what was written, unless it was committed."""
        with contextlib.suppress(OSError):
            self._stream.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _check(self) -> None:
        with _told():
            self._stream.flush()
        self._num_checked = self._num_bytes
        self._store.check_room(self._owner)


def share(path: Path, name: Path) -> None:
    """Give a file a second name, or where the disk can't, a copy; what has that name already stays."""
    with contextlib.suppress(FileExistsError):
        try:
            os.link(path, name)
        except FileExistsError:
            raise
        except OSError:
            copy = name.with_name(f"{name.name}.{secrets.token_hex(8)}")
            shutil.copyfile(path, copy)
            copy.replace(name)


def publish(folder: Path, file: StoredFile, written: Path) -> None:
    """Let `written` be the file: the bytes first, then what makes it exist."""
    written.replace(folder / file.id)
    note = folder / f"{file.id}.{secrets.token_hex(8)}.part"
    with note.open("x", encoding="utf-8") as stream:
        stream.write(file.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    note.replace(folder / f"{file.id}.json")
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Let the disk know the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    path.with_name(f"{path.name}.json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _num_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                total += _num_bytes(Path(entry)) if entry.is_dir() else _share(entry.stat())
    return total


def _share(status: os.stat_result) -> int:
    """One name's part of a file's bytes."""
    return status.st_size // max(status.st_nlink, 1)


def _is_abandoned(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > ABANDONED_S
    return False


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raise what the disk says as `FilesError`."""
    try:
        yield
    except OSError as error:
        raise _unusable(error) from error


def _unusable(error: OSError) -> FilesError:
    return FilesError(f"the directory of files can't be used: {error}")
