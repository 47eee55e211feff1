"""A client of OpenAI's API, as the gateway serves it: `/v1/chat/completions` and `/v1/completions`, streamed or whole.

It gives the chunks of the other clients, so that one exchange measures all of them. Tokens are counted by the server's
`usage`: with `continuous_usage_stats` (vLLM's) every event of a stream has it, else the last one alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from deepseek_triton.clients.api import Chunk, GenerateRequest, Generation
from deepseek_triton.clients.errors import (
    ClientError,
    ProtocolError,
    RequestRejected,
    RequestTimeout,
    ServerOverloaded,
    ServerUnavailable,
)
from deepseek_triton.clients.messages import messages_json
from deepseek_triton.clients.sse import EventReader

KEY_VARIABLE = "OPENAI_API_KEY"
DONE = "[DONE]"
OVERLOADED = (429, 503)
UNAUTHORISED = (401, 403)
MAX_CONNECTIONS = 4096


class OpenAiClient:
    """Calls `model` at `url`, with the API key of the environment variable KEY_VARIABLE if there is one.

    `timeout_s` bounds each wait for bytes. Raises `ClientError` of clients/errors.py.
    """

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        key = os.environ.get(KEY_VARIABLE, "")
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
        # A transport of its own takes no proxy from the environment.
        self._http = httpx.Client(
            base_url=url.rstrip("/").removesuffix("/v1"),
            transport=httpx.HTTPTransport(limits=limits),
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_s,
        )
        self._url, self._model, self._has_key = url, model, bool(key)

    def stream(self, request: GenerateRequest) -> Generator[Chunk, None, None]:
        """Give the answer as it comes; its last chunk has a finish_reason and the tokens of the whole answer."""
        reader, state = EventReader(), _Stream()
        path, body = self._call(request, is_streamed=True)
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise _refusal(response)
                for piece in response.iter_bytes():
                    for data in reader.push(piece):
                        yield from state.push(data)
        except httpx.HTTPError as error:
            raise _translated(error, self._url) from error
        yield from state.end()

    def generate(self, request: GenerateRequest) -> Generation:
        """Wait for the whole answer."""
        path, body = self._call(request, is_streamed=False)
        try:
            response = self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise _translated(error, self._url) from error
        if response.status_code != httpx.codes.OK:
            raise _refusal(response)
        answer = _parsed(response.text)
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            text = choice["message"]["content"] or "" if "message" in choice else choice["text"]
            return Generation(text, choice["finish_reason"], usage["prompt_tokens"], usage["completion_tokens"])
        except (KeyError, IndexError, TypeError) as error:
            raise ProtocolError(f"the answer is no completion of OpenAI's API: {response.text:.120}") from error

    def trouble(self) -> str:
        """Why no request can be answered, in one line; empty: one can."""
        try:
            response = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            return f"no gateway at {self._url}: {error or type(error).__name__}"
        if response.status_code in UNAUTHORISED:
            what = f"refuses the key in {KEY_VARIABLE}" if self._has_key else f"asks for an API key: set {KEY_VARIABLE}"
            return f"the gateway at {self._url} {what}"
        if response.status_code != httpx.codes.OK:
            return f"{self._url}/v1/models answers with status {response.status_code}: is a gateway there?"
        try:
            names = [each["id"] for each in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return f"{self._url}/v1/models is no list of OpenAI's API: is a gateway there?"
        return (
            "" if self._model in names else f"the gateway at {self._url} has no model {self._model!r}; it has {names}"
        )

    def is_ready(self) -> bool:
        """Whether a request would be answered."""
        return not self.trouble()

    def close(self) -> None:
        """Release the connections."""
        self._http.close()

    def _call(self, request: GenerateRequest, *, is_streamed: bool) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": self._model, "max_tokens": request.max_tokens, "stream": is_streamed}
        body |= {
            name: value
            for name, value in (("temperature", request.temperature), ("seed", request.seed))
            if value is not None
        }
        if is_streamed:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        if request.messages is None:
            return "/v1/completions", body | {"prompt": request.prompt}
        return "/v1/chat/completions", body | {"messages": json.loads(messages_json(request.messages))}


@dataclass
class _Stream:
    """Events in, chunks out. The last chunk waits for the usage, which may come in an event after it."""

    num_input: int = 0
    num_output: int = 0
    has_usage: bool = False
    finish_reason: Any = ""
    last_text: str = ""  # of the event with the finish_reason
    is_done: bool = False

    def push(self, data: str) -> Generator[Chunk, None, None]:
        if data == DONE:
            self.is_done = True
            return
        event = _parsed(data)
        if "error" in event:
            raise RequestRejected(_message(event))
        text, has_choice = "", False
        for choice in event.get("choices") or ():
            has_choice = True
            delta: Mapping[str, Any] = choice.get("delta") or {}
            text += delta.get("content") or choice.get("text") or delta.get("reasoning_content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if usage := event.get("usage"):
            self.num_input, self.num_output = usage["prompt_tokens"], usage["completion_tokens"]
            self.has_usage = True
        elif text:
            self.num_output += 1  # an estimate until the usage comes
        if self.finish_reason:
            self.last_text += text
        elif has_choice and (text or usage):
            yield Chunk(text, "", self.num_input, self.num_output)

    def end(self) -> Generator[Chunk, None, None]:
        if not self.is_done:
            raise ProtocolError(f"the stream ended without {DONE}")
        if not self.has_usage:
            raise ProtocolError("the stream had no usage: its tokens can't be counted")
        yield Chunk(self.last_text, self.finish_reason, self.num_input, self.num_output)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"the server sent what is no JSON: {text:.120}") from error


def _message(body: Any) -> str:
    told = body.get("error") if isinstance(body, dict) else None
    return str(told.get("message") if isinstance(told, dict) else told or body)


def _refusal(response: httpx.Response) -> ClientError:
    try:
        message = _message(response.json())
    except ValueError:
        message = response.text[:120]
    kind = ServerOverloaded if response.status_code in OVERLOADED else RequestRejected
    return kind(f"status {response.status_code}: {message}")


def _translated(error: httpx.HTTPError, url: str) -> ClientError:
    told = str(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return RequestTimeout(f"{url}: {told}")
    return ServerUnavailable(f"{url}: {told}")
