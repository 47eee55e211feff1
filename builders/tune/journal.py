"""The journal of a tuning run: a line for each finished point and each finished round, so that a run that was killed
goes on where it was.

The first line says what is measured and on what: measurements of another build, load or machine mean nothing here.
Each later line carries the digest of the very configurations that were served, and is found by it alone. A round is one
line, for only measurements that were made close together can be compared in pairs. A last line without its end is a
write that was cut short; any other damage is an error. One run at a time: the file is locked.
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
from deepseek_triton.builders.tune.space import TuneError

FORMAT = 2


class Journal:
    """Opened for one run, closed as a context manager.

    Raises:
        TuneError: the file is damaged, of something else, or of a run that is under way.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self.path = path
        self._points: dict[str, Measurement] = {}
        self._rounds: dict[tuple[int, frozenset[str]], dict[str, Measurement]] = {}
        header = {"format": FORMAT, **subject}
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
        """What was measured of the configurations with this digest, or None."""
        return self._points.get(configs)

    def add(self, configs: str, measured: Measured) -> None:
        """Note a finished point; it is on the disk when this returns. A failure may pass, so none is kept."""
        if not measured.result.failure:
            self._points[configs] = measured.result
            self._append({"configs": configs, "point": measured.point, "result": measured.result.to_dict()})

    def get_round(self, number: int, configs: Sequence[str]) -> list[Measurement] | None:
        """The measurements of a round between exactly these, in their order."""
        found = self._rounds.get((number, frozenset(configs)))
        return [found[each] for each in configs] if found else None

    def add_round(self, number: int, results: Mapping[str, Measurement]) -> None:
        """Note a finished round: digest → measurement."""
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
        """Lock the file, read it, and cut off what a killed run didn't finish to write."""
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
