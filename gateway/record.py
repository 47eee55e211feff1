"""RequestRecord: what is known of one HTTP request while it runs. Routes write it; middleware reads it at the end.

So the tokens of a request are counted however it ends: a client that leaves in the middle has used them too.
"""

from __future__ import annotations

import asyncio
import random
import re
import uuid
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

Scope = MutableMapping[str, Any]

KEY = "gateway.record"
MODEL_HEADER, DEGRADED_HEADER = "x-deepseek-model", "x-deepseek-degraded"
COLLECTION_HEADER = "x-deepseek-collection"
# A client's id is kept if it is harmless in headers, logs and file names.
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass
class TokenUsage:
    """Tokens of one request so far. cached: of the prompt's tokens, those that weren't computed again."""

    input: int = 0
    output: int = 0
    cached: int = 0
    reasoning: int = 0


@dataclass
class RouteNotes:
    """The way that one HTTP request's calls took, which the headers of its answer tell.

    models: those that answered, by the names that the server knows. degradations: in which ways the answer is less
    than was asked for: "fallback", "cached", "shortened". lot: in [0, 1), by which shares of requests are dealt.
    is_told: the headers have gone to the client, so that nothing that they tell may change.
    """

    models: list[str] = field(default_factory=list)
    degradations: list[str] = field(default_factory=list)
    lot: float = field(default_factory=random.random)
    is_told: bool = False

    def answered_by(self, model: str) -> None:
        """An answer of `model` begins."""
        if model not in self.models:
            self.models.append(model)

    def degraded(self, how: str) -> None:
        """The answer is less than was asked for."""
        if how not in self.degradations:
            self.degradations.append(how)

    def headers(self) -> dict[str, str]:
        """What the client is told; a name that a header can't hold is left out."""
        told = {MODEL_HEADER: ",".join(self.models), DEGRADED_HEADER: ",".join(self.degradations)}
        return {name: text for name, text in told.items() if text and text.isascii() and text.isprintable()}


@dataclass
class RequestRecord:
    """One HTTP request.

    owner: whose key it came with; empty without keys. caller: that key's id, or the network address. model: the name
    that the body gives, once it has been read. usage: of all its prompts and answers. has_left: the client went away
    before the answer's end. ended_by: why the gateway ends the request before its time. is_unsent: it was refused
    because no server may be asked now. route: the way of its calls to the servers. is_background: the answer is
    computed after the response, by `task`, and `settle`, if somebody has set it, is called when its tokens are known.
    collection: whether the answer is collected, "on" or "off", where the gateway collects any.
    """

    request_id: str
    owner: str = ""
    caller: str = ""
    model: str | None = None
    is_streamed: bool = False
    has_left: bool = False
    ended_by: Exception | None = None
    is_unsent: bool = False
    is_background: bool = False
    task: asyncio.Task[None] | None = None
    settle: Callable[[], None] | None = None
    usage: TokenUsage = field(default_factory=TokenUsage)
    route: RouteNotes = field(default_factory=RouteNotes)
    collection: str = ""

    def headers(self) -> dict[str, str]:
        """What every answer tells of its request."""
        told = {"x-request-id": self.request_id, **self.route.headers()}
        return {**told, COLLECTION_HEADER: self.collection} if self.collection else told


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request with this ASGI scope; made when it is first asked for."""
    record = scope.get(KEY)
    if record is None:
        record = scope[KEY] = RequestRecord(_request_id(scope))
    assert isinstance(record, RequestRecord)
    return record


def _request_id(scope: Scope) -> str:
    """The client's X-Request-Id, else a random one."""
    for name, value in scope.get("headers", ()):
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if REQUEST_ID.fullmatch(text):
                return str(text)
    return uuid.uuid4().hex
