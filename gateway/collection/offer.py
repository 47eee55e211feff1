"""Offer: what a route does with its answers: they are collected, if operator, key and request let them be."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterable, Mapping
from datetime import datetime, timezone

from starlette.requests import Request

from deepseek_triton.clients import Chunk, GenerateRequest, Generation, Message
from deepseek_triton.gateway.apis.wire.context import context_of
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.collection.collector import Collector
from deepseek_triton.gateway.collection.lines import AnswerId, CollectedAnswer
from deepseek_triton.gateway.protection.keys.caller import caller_of
from deepseek_triton.gateway.record import RequestRecord, record_of

MAX_TEXT_CHARS = 1_000_000  # as `learn` reads
LEARNABLE_MEMBERS = {"role", "content", "name", "reasoning_content"}  # of a message; the last two are left out


class Offer:
    """The answers of one HTTP request. collector: None keeps none of them. user: whom the request names, or ""."""

    def __init__(self, collector: Collector | None, record: RequestRecord, user: str = "") -> None:
        self._collector, self._record, self._user = collector, record, user

    def whole(self, asked: GenerateRequest, generations: Iterable[Generation], first_choice: int = 0) -> None:
        """Collect finished answers. first_choice: the index of the first of them among the request's choices."""
        if self._collector is not None and is_learnable(asked):
            for one in generations:
                if not one.tool_calls:
                    self._put(asked, first_choice + one.sequence_index, one.text, one.finish_reason)

    def stream(
        self, asked: GenerateRequest, chunks: AsyncGenerator[Chunk, None], first_choice: int = 0
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks as they come; each answer is collected when it has ended."""
        keeps = self._collector is not None and is_learnable(asked)
        return self._collecting(asked, chunks, first_choice) if keeps else chunks

    async def _collecting(
        self, asked: GenerateRequest, chunks: AsyncGenerator[Chunk, None], first_choice: int
    ) -> AsyncGenerator[Chunk, None]:
        texts: dict[int, list[str]] = {}
        calling: set[int] = set()
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                index = chunk.sequence_index
                texts.setdefault(index, []).append(chunk.text)
                if chunk.tool_calls:
                    calling.add(index)
                if chunk.finish_reason and index not in calling:
                    self._put(asked, first_choice + index, "".join(texts.pop(index)), chunk.finish_reason)
                yield chunk

    def _put(self, asked: GenerateRequest, choice: int, text: str, finish_reason: str) -> None:
        assert self._collector is not None
        record, names = self._record, self._collector.pseudonyms
        if not _is_text(text) or "cached" in record.route.degradations:
            return
        messages = tuple(_pair(one) for one in asked.messages or ())
        self._collector.put(
            CollectedAnswer(
                AnswerId(record.request_id, choice, names.owner(record.owner)),
                names.user(self._user),
                record.model or "",
                record.route.models[-1] if record.route.models else record.model or "",
                datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
                finish_reason,
                text.removeprefix(asked.prompt or "") if asked.exclude_input_in_output is False else text,
                asked.prompt or "",
                messages,
            )
        )


def offer_of(request: Request, store: bool | None, user: str | None = None) -> Offer:
    """What becomes of a request's answers. store: what the request says of it; user: whom it names.

    Raises:
        ApiError: `store: true`, where nothing is kept.
    """
    collector, record, caller = context_of(request).collector, record_of(request.scope), caller_of(request.scope)
    # A job's request has no caller: it was asked for earlier, by a key whose choice isn't known now.
    keeps = collector is not None and store is not False and caller is not None and caller.is_collected
    if store and not keeps:
        raise ApiError(400, "store: true is not supported: answers aren't collected here", param="store")
    if collector is not None:
        record.collection = "on" if keeps else "off"
    return Offer(collector if keeps else None, record, user or "")


def is_learnable(asked: GenerateRequest) -> bool:
    """Whether `learn` could read it: texts alone, no tools, and a chat in which the assistant is to answer."""
    if asked.prompt is not None:
        return True
    turns = [_pair(one) for one in asked.messages or ()]
    plain = all(isinstance(one, Message) or set(one) <= LEARNABLE_MEMBERS for one in asked.messages or ())
    return (
        plain
        and not asked.tools
        and all(map(_is_text, (content for _, content in turns)))
        and turns[0][0] != "assistant" != turns[-1][0]
    )


def _pair(turn: Message | Mapping[str, object]) -> tuple[str, str]:
    if isinstance(turn, Message):
        return turn.role, turn.content
    content = turn.get("content")
    return str(turn["role"]), content if isinstance(content, str) else ""


def _is_text(text: str) -> bool:
    return bool(text.strip()) and len(text) <= MAX_TEXT_CHARS and "\0" not in text
