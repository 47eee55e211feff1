"""Collector: takes answers and feedback from the event loop, and writes them on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from pathlib import Path

from prometheus_client import Counter, Gauge

from deepseek_triton.gateway.collection.files import CollectionFiles, Kind, LineTooLongError
from deepseek_triton.gateway.collection.lines import AnswerId, CollectedAnswer, Feedback
from deepseek_triton.gateway.collection.pseudonyms import Pseudonyms
from deepseek_triton.gateway.collection.redactor import RedactionError, RedactionTimeoutError, Redactor
from deepseek_triton.gateway.observe.metrics import GatewayMetrics
from deepseek_triton.gateway.settings import GatewaySettings

log = logging.getLogger(__name__)

MAX_WAITING, MAX_WAITING_CHARS = 1000, 32 << 20  # what waits to be written; more is dropped, and counted
MAX_RECENT = 10_000  # answers of this process that are found without reading files
TIDY_S = 600.0  # between two looks for what is too old
CLOSE_S = 5.0  # for what still waits when the gateway ends
WARN_S = 60.0


class Collector:
    """One process's writer. `records` counts what became of everything, `size` holds the bytes of the files."""

    def __init__(self, files: CollectionFiles, redactor: Redactor, records: Counter, size: Gauge) -> None:
        self.files = files
        self.pseudonyms = Pseudonyms(files.directory)
        self._redactor, self._records, self._size = redactor, records, size
        self._waiting: deque[CollectedAnswer | Feedback] = deque()
        self._num_chars = 0
        self._recent: dict[AnswerId, None] = {}
        self._reading = threading.Lock()
        self.num_lookups = 0
        self._changed = threading.Condition()
        self._is_closing = False
        self._told_at = -WARN_S
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)

    def start(self) -> None:
        """Start the redactor and the thread. Raises `RedactionError` if the redactor can't be loaded."""
        self._redactor.start()
        self._thread.start()
        log.warning("answers are collected in %s", self.files.directory)

    def put(self, record: CollectedAnswer | Feedback) -> bool:
        """Hand over a record, without waiting; False: too much waits already, and it is dropped."""
        with self._changed:
            is_full = len(self._waiting) >= MAX_WAITING or self._num_chars + record.num_chars > MAX_WAITING_CHARS
            if not is_full and not self._is_closing:
                self._waiting.append(record)
                self._num_chars += record.num_chars
                if isinstance(record, CollectedAnswer):
                    self._recent[record.id] = None
                    if len(self._recent) > MAX_RECENT:
                        del self._recent[next(iter(self._recent))]
                self._changed.notify()
                return True
        self._count(record, "dropped_full")
        return False

    def has(self, answer: AnswerId) -> bool:
        """Whether an answer is kept or about to be; it may read all files, as one of `num_lookups` after the other."""
        if answer in self._recent:
            return True
        self.num_lookups += 1
        try:
            with self._reading:
                return self.files.has(answer)
        finally:
            self.num_lookups -= 1

    def close(self) -> None:
        """Write what waits, for a few seconds, and end."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)
        with self._changed:
            left, self._waiting = list(self._waiting), deque()
        for record in left:
            self._count(record, "dropped_full")
        self._redactor.close()

    def _run(self) -> None:
        tidied_at = -TIDY_S
        while True:
            if time.monotonic() - tidied_at >= TIDY_S:
                tidied_at = time.monotonic()
                self._tidy()
            with self._changed:
                if not self._waiting and not self._is_closing:
                    self._changed.wait(TIDY_S)
                if not self._waiting:
                    if self._is_closing:
                        return
                    continue
                record = self._waiting.popleft()
                self._num_chars -= record.num_chars
            self._count(record, self._write(record))

    def _write(self, record: CollectedAnswer | Feedback) -> str:
        """Redact and append a record; what became of it."""
        try:
            texts = self._redactor.redact(record.texts())
            if texts is None:
                return "refused"
            self.files.append(_kind(record), record.line(texts))
            self._size.set(self.files.num_bytes())
        except RedactionTimeoutError as error:
            return self._failed("redaction_timeout", error)
        except RedactionError as error:
            return self._failed("redaction_failed", error)
        except (LineTooLongError, UnicodeEncodeError) as error:
            return self._failed("unfit", error)
        except OSError as error:
            return self._failed("write_failed", error)
        return "written"

    def _tidy(self) -> None:
        try:
            self.files.remove_old()
            self._size.set(self.files.num_bytes())
        except OSError as error:
            self._failed("write_failed", error)

    def _failed(self, outcome: str, error: Exception) -> str:
        if time.monotonic() - self._told_at >= WARN_S:
            self._told_at = time.monotonic()
            log.error("a record isn't collected (%s): %s", outcome, error)
        return outcome

    def _count(self, record: CollectedAnswer | Feedback, outcome: str) -> None:
        self._records.labels(_kind(record), outcome).inc()


def _kind(record: CollectedAnswer | Feedback) -> Kind:
    return "answers" if isinstance(record, CollectedAnswer) else "feedback"


def make_collector(settings: GatewaySettings, metrics: GatewayMetrics) -> Collector:
    """The collector of these settings. Raises `OSError` if the directory can't be used."""
    files = CollectionFiles(Path(settings.collect).expanduser(), settings.collect_bytes, settings.collect_days)
    redactor = Redactor(settings.collect_redactor, settings.collect_redactor_s)
    return Collector(files, redactor, metrics.collected, metrics.collection_bytes)
