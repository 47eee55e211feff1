"""The journal of a tuning run: a line for each finished point, so that a run that was killed goes on where it was.

The first line says what is measured: points of another model or another load mean nothing here. A last line without
its end is a write that was cut short, and its point is measured again; any other damage is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builders.tune.search import Measured, Measurement
from builders.tune.space import Point, TuneError

FORMAT = 1


class Journal:
    """Opened for one run; `found` is what earlier runs measured.

    Raises:
        TuneError: the file is damaged, or of something else.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self.path = path
        self.found: dict[tuple[tuple[str, int], ...], Measurement] = {}
        header = {"format": FORMAT, **subject}
        try:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise TuneError(f"{path} can't be read: {error}; remove it to start anew") from error
        whole = text[: text.rfind("\n") + 1]
        lines = whole.splitlines()
        if lines:
            self._check_header(lines[0], header)
            for number, line in enumerate(lines[1:], start=2):
                point, result = self._read(number, line)
                self.found[_key(point)] = result
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as stream:
                stream.write(whole or json.dumps(header) + "\n")
        except OSError as error:
            raise TuneError(f"{path}: {error.strerror}; choose another --output") from error

    def get(self, point: Point) -> Measurement | None:
        """What was measured at `point`, or None."""
        return self.found.get(_key(point))

    def add(self, measured: Measured) -> None:
        """Note a finished point; it is on the disk when this returns."""
        self.found[_key(measured.point)] = measured.result
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"point": measured.point, "result": asdict(measured.result)}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

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

    def _read(self, number: int, line: str) -> tuple[dict[str, int], Measurement]:
        try:
            values = json.loads(line)
            point = {str(name): int(value) for name, value in values["point"].items()}
            return point, Measurement(**values["result"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise TuneError(f"{self.path}:{number} is damaged; remove that line, or the file to start anew") from None


def _key(point: Point) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(point.items()))
