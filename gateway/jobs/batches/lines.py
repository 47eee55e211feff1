"""Lines of a batch's file: read one by one, checked, and made into requests. Nothing but one line is held in memory.

A line is `{"custom_id": …, "method": "POST", "url": the batch's endpoint, "body": {…}}`. What makes a line impossible
to answer is a fault of the file; a body that its endpoint refuses is that line's affair, and its answer tells so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_triton.gateway.jobs.batches.queue import BatchLine
from deepseek_triton.gateway.protection.strict_json import JsonBounds, JsonError, parse

MAX_FAULTS = 100  # that a batch tells
MAX_BLANK = 4  # times as many lines as requests are looked at
MAX_CUSTOM_ID = 512
OTHER_BYTES = 4096  # of a line, beside its body
FIELDS = ("custom_id", "method", "url", "body")
# Fields that ask for what a line of a batch hasn't.
NOT_IN_BATCHES = ("stream", "background", "previous_response_id")
WITH_PRIORITY = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
BOM = b"\xef\xbb\xbf"


class LineError(Exception):
    """A line that can't become a request. code, param: of the fault, as OpenAI's API tells it."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def fault(self, number: int | None) -> dict[str, Any]:
        """How a batch tells it; number: of the line, from 1; None: the file as a whole."""
        return {"code": self.code, "message": str(self), "param": self.param, "line": number}


@dataclass(frozen=True)
class LineRules:
    """What a line may be. max_lines: of a file. priority: what a line's request has at least; 0: its own."""

    bounds: JsonBounds
    max_body_bytes: int
    max_lines: int
    priority: int


def check_file(path: Path, endpoint: str, rules: LineRules) -> tuple[int, Sequence[Mapping[str, Any]]]:
    """The number of a file's lines that aren't blank, and its faults; none: every line can become a request."""
    faults: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    count = 0
    for number, _, text in _lines(path, rules, 0, 0):
        is_blank = text is not None and not text.strip()
        if is_blank and number < MAX_BLANK * rules.max_lines:
            continue
        count += not is_blank
        try:
            if is_blank:
                raise LineError("too_many_requests", f"a batch may have {rules.max_lines} requests at most")
            custom_id = _request(text, endpoint, rules)["custom_id"]
            digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
            if digest in seen:
                raise LineError("duplicate_custom_id", f"custom_id {custom_id!r} has come before", "custom_id")
            seen.add(digest)
            if count > rules.max_lines:
                raise LineError("too_many_requests", f"a batch may have {rules.max_lines} requests at most")
        except LineError as error:
            faults.append(error.fault(number))
            if len(faults) >= MAX_FAULTS or error.code == "too_many_requests":
                break
    if not count:
        faults.append(LineError("empty_file", "the file has no requests").fault(None))
    return count, faults


def read_lines(path: Path, endpoint: str, rules: LineRules, after: tuple[int, int], count: int) -> list[BatchLine]:
    """The next `count` lines, or as many as a request may have bytes, behind a place: lines and bytes before it."""
    found: list[BatchLine] = []
    num_bytes = 0
    for number, end, text in _lines(path, rules, *after):
        if text is not None and not text.strip():
            continue
        request = _request(text, endpoint, rules)
        body = json.dumps(_quiet(endpoint, request["body"], rules.priority), ensure_ascii=False, separators=(",", ":"))
        found.append(BatchLine(number, end, request["custom_id"], body))
        num_bytes += len(body)
        if len(found) >= count or num_bytes >= rules.max_body_bytes:
            break
    return found


def _lines(path: Path, rules: LineRules, number: int, start: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Each line's number, the bytes up to its end, and its text; None: it is too long, and the last that is given."""
    longest = rules.max_body_bytes + OTHER_BYTES
    with path.open("rb") as stream:
        stream.seek(start)
        while text := stream.readline(longest + 1):
            number += 1
            if len(text) > longest:
                yield number, stream.tell(), None
                return
            yield number, stream.tell(), text.removeprefix(BOM) if number == 1 else text


def _request(text: bytes | None, endpoint: str, rules: LineRules) -> dict[str, Any]:
    """The line's object. Raises `LineError`."""
    if text is None:
        limit = rules.max_body_bytes + OTHER_BYTES
        raise LineError("line_too_long", f"a line may have {limit} bytes at most; those behind it aren't looked at")
    try:
        value = parse(text, rules.bounds)
    except JsonError as error:
        raise LineError("invalid_json_line", str(error).replace("the body", "the line")) from None
    if not isinstance(value, dict):
        raise LineError("invalid_json_line", "the line must be a JSON object")
    for name in value:
        if name not in FIELDS:
            raise LineError("unknown_parameter", f"unknown field {name[:80]!r}", name[:80])
    for name in FIELDS:
        if name not in value:
            raise LineError("missing_required_parameter", f"{name} is required", name)
    custom_id = value["custom_id"]
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        raise LineError(
            "invalid_custom_id", f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters", "custom_id"
        )
    if value["method"] != "POST":
        raise LineError("invalid_method", f"method must be POST, got {str(value['method'])[:80]!r}", "method")
    if value["url"] != endpoint:
        raise LineError(
            "invalid_url", f"url must be the batch's endpoint {endpoint}, got {str(value['url'])[:80]!r}", "url"
        )
    if not isinstance(value["body"], dict):
        raise LineError("invalid_body", "body must be an object", "body")
    for name in NOT_IN_BATCHES:
        if value["body"].get(name):
            raise LineError("unsupported_parameter", f"body.{name} is not supported in a batch", f"body.{name}")
    return value


def _quiet(endpoint: str, body: dict[str, Any], priority: int) -> dict[str, Any]:
    """The body as it is asked: behind live requests, and without taking the room of responses that clients read."""
    more: dict[str, Any] = {}
    if endpoint in WITH_PRIORITY and priority:
        own = body.get("priority")
        more["priority"] = max(own, priority) if type(own) is int else priority if own is None else own
    if endpoint == "/v1/responses" and "store" not in body:
        more["store"] = False
    return {**body, **more}
