"""The journal of a tuning run, from which a run that was killed resumes.

The first line is the fingerprint: measurements of another build, load or machine aren't comparable. Each later line is
a finished point or round, identified by the digest of the served configurations. A round is one line, because only
measurements made close together can be compared in pairs. An incomplete last line is an interrupted write and is
dropped; any other damage is an error. The file is locked while a run uses it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from deepseek_triton.builders.tune.measurement import Measured, Measurement
from deepseek_triton.builders.tune.options import TuneError

FORMAT = 2


class Journal:
    """The open journal of one run; a context manager.

    Raises:
        TuneError: the file is damaged, has another fingerprint, or is in use by another run.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        self._points: dict[str, Measurement] = {}
        self._rounds: dict[tuple[int, frozenset[str]], dict[str, Measurement]] = {}
        header = {"format": FORMAT, **fingerprint}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("ab+", buffering=0)
        except OSError as error:
            raise TuneError(f"{path}: {error.strerror}; choose another --output") from error
        try:
            self._open(header)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def get(self, configs: str) -> Measurement | None:
        """Return the measurement of the configurations with this digest, or None."""
        return self._points.get(configs)

    def add(self, configs: str, measured: Measured) -> None:
        """Record a finished point durably. Failures may be temporary and aren't recorded."""
        if not measured.result.failure:
            self._points[configs] = measured.result
            self._append({"configs": configs, "point": measured.point, "result": measured.result.to_dict()})

    def get_round(self, number: int, configs: Sequence[str]) -> list[Measurement] | None:
        """Return the measurements of a round of exactly these configurations, in their order; None if absent."""
        found = self._rounds.get((number, frozenset(configs)))
        return [found[each] for each in configs] if found else None

    def add_round(self, number: int, results: Mapping[str, Measurement]) -> None:
        """Record a finished round, given as digest → measurement."""
        if not any(result.failure for result in results.values()):
            self._rounds[number, frozenset(results)] = dict(results)
            plain = {configs: result.to_dict() for configs, result in results.items()}
            self._append({"round": number, "results": plain})

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self._write(entry)
        except OSError as error:
            raise TuneError(f"{self.path}: {error.strerror}; make room, the same command goes on from there") from error

    def _write(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        while line:
            line = line[self._stream.write(line) :]
        os.fsync(self._stream.fileno())

    def _open(self, header: dict[str, Any]) -> None:
        """Lock and read the file, and remove an incomplete last line."""
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "is in use by another run; wait for its end, or choose another --output"
            raise TuneError(f"{self.path} {what}") from None
        try:
            self._stream.seek(0)
            data = self._stream.readall()
            lines = data[: data.rfind(b"\n") + 1].decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TuneError(f"{self.path} can't be read: {error}; remove it to start anew") from error
        if lines:
            self._check_header(lines[0], header)
            for number, line in enumerate(lines[1:], start=2):
                self._read(number, line)
        try:
            self._stream.truncate(data.rfind(b"\n") + 1)
            if not lines:
                self._write(header)
        except OSError as error:
            raise TuneError(f"{self.path}: {error.strerror}; choose another --output") from error

    def _check_header(self, line: str, header: dict[str, Any]) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or "format" not in found:
            raise TuneError(f"{self.path}:1 is no journal's first line; remove the file to start anew")
        for name in sorted(found.keys() | header.keys()):
            if found.get(name) != header.get(name):
                what = f"{name} is {found.get(name)!r} there and {header.get(name)!r} now"
                raise TuneError(f"{self.path} is of another run: {what}; remove it, or choose another --output")

    def _read(self, number: int, line: str) -> None:
        try:
            values = json.loads(line)
            if "round" in values:
                results = {str(name): Measurement.from_dict(each) for name, each in values["results"].items()}
                self._rounds[int(values["round"]), frozenset(results)] = results
            else:
                self._points[str(values["configs"])] = Measurement.from_dict(values["result"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TuneError(f"{self.path}:{number} is damaged; remove that line, or the file to start anew") from None
