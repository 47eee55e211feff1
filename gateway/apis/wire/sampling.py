"""How an answer is made: the fields that OpenAI's chats and completions share, and what they are in a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag, model_validator

from deepseek_triton.clients import GenerateRequest
from deepseek_triton.gateway.apis.wire.errors import invalid
from deepseek_triton.gateway.apis.wire.validation import Body, field_error

Stop = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Field(max_length=64), Tag("<texts>")],
    Discriminator(lambda value: "<texts>" if isinstance(value, list) else "<text>"),
]


class StreamOptions(Body):
    """What a stream holds beside the answer; `continuous_usage_stats` (vLLM's): the usage so far in every chunk."""

    NOT_SUPPORTED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(Body):
    """What chats and completions share. Fields after `seed` are not OpenAI's, but vLLM's."""

    model: str = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=64)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    stop: Stop | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    bad_words: list[str] | None = Field(default=None, max_length=64)
    priority: int | None = Field(default=None, ge=0, lt=2**31)
    user: str | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "stream_options must come with stream: true")
        return self


def make_request(body: SamplingBody, **more: Any) -> GenerateRequest:
    """The request with the sampling options of `body`, and with `more`. Raises `ApiError`."""
    count = body.n or 1
    options = {
        # Several answers to one prompt differ only with a temperature: OpenAI's default.
        "temperature": 1.0 if body.temperature is None and count > 1 else body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "max_tokens": body.max_tokens,
        "min_tokens": body.min_tokens,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty,
        "seed": None if body.seed is None else body.seed % 2**64,
        "stop_words": stop_words(body.stop),
        "bad_words": body.bad_words or None,
        "num_return_sequences": count if count > 1 else None,
        "priority": body.priority,
    }
    try:
        return GenerateRequest(**{**options, **more})
    except ValueError as error:
        raise invalid(str(error)) from None


def stop_words(stop: str | list[str] | None) -> list[str] | None:
    """The texts that end an answer; None: there are none."""
    return ([stop] if isinstance(stop, str) else stop) or None
