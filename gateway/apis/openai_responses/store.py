"""ResponseStore: responses that can be read, continued and cancelled later. It lies in one process's memory."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from deepseek_triton.gateway.apis.openai_responses.items import Turn


@dataclass
class StoredResponse:
    """A response.

    owner: whose key it was made with; nobody else sees it. turns: the conversation before its answer, without
    instructions. input_items: of its own request. task: computes it in the background; None: it is complete.
    """

    owner: str
    response: dict[str, Any]
    turns: list[Turn]
    input_items: list[dict[str, Any]]
    task: asyncio.Task[None] | None = None
    num_bytes: int = 0
    stored_at: float = 0.0


class ResponseStore:
    """Keeps responses of at most `max_bytes` together for at most `max_age_s` seconds; the oldest go first."""

    def __init__(self, max_bytes: int, max_age_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._num_bytes = 0
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()

    @property
    def num_running(self) -> int:
        """The number of responses that are computed in the background."""
        return sum(stored.task is not None for stored in self._responses.values())

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        """The response, if it is there and of this owner."""
        self._drop_old()
        stored = self._responses.get(response_id)
        return stored if stored is not None and stored.owner == owner else None

    def put(self, stored: StoredResponse) -> None:
        """Keep a response, whose size is taken now; one that grew is put again."""
        self.remove(stored)
        stored.stored_at = time.monotonic()
        stored.num_bytes = len(json.dumps([stored.response, stored.turns, stored.input_items]))
        self._num_bytes += stored.num_bytes
        self._responses[stored.response["id"]] = stored
        self._drop_old()

    def remove(self, stored: StoredResponse) -> None:
        """Forget a response; one that is computed goes on."""
        if self._responses.pop(stored.response["id"], None) is not None:
            self._num_bytes -= stored.num_bytes

    def start(self, stored: StoredResponse, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Compute a response in the background, by the task that is returned, and keep it."""

        async def run() -> None:
            try:
                await work
            finally:
                stored.task = None
                if stored.response["id"] in self._responses:
                    self.put(stored)

        stored.task = task = asyncio.create_task(run())
        self.put(stored)
        return task

    async def cancel(self, stored: StoredResponse) -> None:
        """End the computing of a response, and wait for its end; nothing happens to one that is complete."""
        if stored.task is not None:
            stored.task.cancel()
            await asyncio.wait({stored.task})

    async def close(self) -> None:
        """End everything that is computed."""
        for stored in list(self._responses.values()):
            await self.cancel(stored)

    def _drop_old(self) -> None:
        """Drop what is too old or too much, but not what is computed: it ends by itself."""
        oldest = time.monotonic() - self._max_age_s
        for stored in list(self._responses.values()):
            if stored.stored_at >= oldest and self._num_bytes <= self._max_bytes:
                return
            if stored.task is None:
                self.remove(stored)
