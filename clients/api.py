"""What every client takes and gives: a request, the pieces of its answer, and the interface.

Clients never import builders: the one thing they share with the rest of the project is
`ensemble.contract`. This file knows neither gRPC nor HTTP, and checks only what needs no model: the ranges of
options, not whether a prompt fits the context.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, TypeVar, cast

from clients.errors import ProtocolError
from ensemble import contract
from ensemble.contract import FINISH_REASONS, FinishReason, TensorSpec

DEFAULT_TIMEOUT_S = 300.0
MAX_INT32 = 2**31 - 1
MAX_UINT64 = 2**64 - 1
MAX_FLOAT32 = (2 - 2**-23) * 2.0**127

Scalar = bool | int | float | str
T = TypeVar("T", int, str)


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `role` is the chat template's: usually system, user or assistant."""

    role: str
    content: str

    def __post_init__(self) -> None:
        """Check both texts."""
        if not self.role:
            raise ValueError(f"role must not be empty, got {self.role!r}")
        _check_text("role", self.role)
        _check_text("content", self.content)

    @classmethod
    def from_dict(cls, message: Mapping[str, str]) -> Message:
        """Read OpenAI's form, `{"role": …, "content": …}`; `ValueError` for any other."""
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f'each of messages must be {{"role": …, "content": …}}, got {message!r}')
        return cls(**message)


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt, as it is or as a chat, and how to continue it.

    `prompt` goes to the model without a template; `messages` go through the model's chat template. Exactly
    one of the two is given. An option that is None is not sent: the server's default holds.

    Raises `ValueError`, naming the field and its value, for anything out of range.
    """

    prompt: str | None = None
    messages: Sequence[Message | Mapping[str, str]] | None = None
    max_tokens: int | None = None  # tokens, 1 … 2^31-1
    temperature: float | None = None  # 0 (greedy) …; finite
    top_k: int | None = None  # tokens, 0 (all) … 2^31-1
    top_p: float | None = None  # probability, 0 < top_p <= 1
    seed: int | None = None  # 0 … 2^64-1

    def __post_init__(self) -> None:
        """Check every field; keep `messages` as a tuple, so that nobody changes them afterwards."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError(
                f"exactly one of prompt and messages must be given, "
                f"got prompt={self.prompt!r}, messages={self.messages!r}"
            )
        if self.prompt is not None:
            _check_text("prompt", self.prompt)
        if self.messages is not None:
            if not self.messages:
                raise ValueError(f"messages must not be empty, got {self.messages!r}")
            messages = (m if isinstance(m, Message) else Message.from_dict(m) for m in self.messages)
            object.__setattr__(self, "messages", tuple(messages))
        _check_int("max_tokens", self.max_tokens, 1, MAX_INT32)
        _check_float("temperature", self.temperature, MAX_FLOAT32)
        _check_int("top_k", self.top_k, 0, MAX_INT32)
        _check_float("top_p", self.top_p, 1.0)
        if self.top_p == 0:
            raise ValueError(f"top_p must be above 0, got {self.top_p!r}")
        _check_int("seed", self.seed, 0, MAX_UINT64)

    def to_tensors(self, *, stream: bool) -> dict[TensorSpec, Scalar]:
        """Give the input tensors of `contract.GENERATE`, one element each; absent options are left out."""
        tensors: dict[TensorSpec, Scalar] = {contract.STREAM: stream}
        for field, spec in FIELD_TENSORS.items():
            value = getattr(self, field)
            if value is not None:
                tensors[spec] = float(value) if spec.dtype == "FP32" else value
        if self.messages is not None:
            chat = [asdict(cast("Message", message)) for message in self.messages]
            tensors[contract.MESSAGES] = json.dumps(chat, ensure_ascii=False)
        return tensors


# The fields that travel as they are; `messages` travels as JSON.
FIELD_TENSORS: dict[str, TensorSpec] = {
    "prompt": contract.TEXT_INPUT,
    "max_tokens": contract.MAX_TOKENS,
    "temperature": contract.TEMPERATURE,
    "top_k": contract.TOP_K,
    "top_p": contract.TOP_P,
    "seed": contract.SEED,
}


@dataclass(frozen=True)
class Chunk:
    """One response of a stream: the text since the last one, and how far the answer is."""

    text: str
    finish_reason: FinishReason | Literal[""]  # "" until the last response
    num_input_tokens: int
    num_output_tokens: int  # of the answer so far

    @classmethod
    def from_outputs(cls, outputs: Mapping[str, Scalar]) -> Chunk:
        """Read the outputs of `contract.GENERATE`; `ProtocolError` for a missing or mistyped one.

        Outputs beyond these are ignored: a newer server may give more.
        """
        reason = _output(outputs, contract.FINISH_REASON, str)
        if reason not in ("", *FINISH_REASONS):
            raise ProtocolError(f"finish_reason must be empty or one of {FINISH_REASONS}, got {reason!r}")
        return cls(
            text=_output(outputs, contract.TEXT_OUTPUT, str),
            finish_reason=cast("FinishReason", reason),
            num_input_tokens=_output(outputs, contract.NUM_INPUT_TOKENS, int),
            num_output_tokens=_output(outputs, contract.NUM_OUTPUT_TOKENS, int),
        )


@dataclass(frozen=True)
class Generation:
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    num_input_tokens: int
    num_output_tokens: int

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk]) -> Generation:
        """Join the chunks of a complete stream; `ValueError` if the last one isn't there."""
        last = chunks[-1] if chunks else None
        if last is None or last.finish_reason == "":
            raise ValueError(f"chunks must end with one that has a finish_reason, got {last!r}")
        text = "".join(chunk.text for chunk in chunks)
        return cls(text, last.finish_reason, last.num_input_tokens, last.num_output_tokens)


class Client(Protocol):
    """The interface of `GrpcClient` and `HttpClient`, and of their fakes."""

    def generate(self, request: GenerateRequest) -> Generation:
        """Wait for the whole answer. Raises `ClientError`."""
        ...

    def stream(self, request: GenerateRequest) -> Generator[Chunk, None, None]:
        """Give the answer as it comes; only the last chunk has a `finish_reason`. Raises `ClientError`.

        The request goes out with the first `next()`. Closing the iterator early stops the request on the
        server too: wrap it in `contextlib.closing` where a loop may be left.
        """
        ...

    def is_ready(self, model: str | None = None) -> bool:
        """Say whether `model` (None: the client's own) can be called; False too if nothing answers."""
        ...

    def close(self) -> None:
        """Release the connections."""
        ...


def _check_text(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be text that UTF-8 can encode, got {text[error.start]!r} at character {error.start}"
        ) from None


def _check_int(name: str, value: int | None, lowest: int, highest: int) -> None:
    # bool is an int to Python, and no count to us.
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest):
        raise ValueError(f"{name} must be an integer from {lowest} to {highest}, got {value!r}")


def _check_float(name: str, value: float | None, highest: float) -> None:
    if value is not None and (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not 0 <= value <= highest
    ):
        raise ValueError(f"{name} must be a finite number from 0 to {highest:.6g}, got {value!r}")


def _output(outputs: Mapping[str, Scalar], spec: TensorSpec, kind: type[T]) -> T:
    value = outputs.get(spec.name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProtocolError(f"output {spec.name} must be one {spec.dtype}, got {value!r}")
    return value
