"""The outputs of `contract.GENERATE` → chunks: what each response adds to each sequence.

A response reports on one sequence or several. Every tensor has one value for each of them, except the log
probabilities: they have one for each new token, concatenated in the order of the sequences. Outputs that weren't asked
for are absent. Unknown outputs are ignored, since a newer server may send more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from deepseek_triton.clients.errors import ProtocolError
from deepseek_triton.clients.request import Scalar
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import FINISH_REASONS, DType, FinishReason, TensorSpec

Outputs = Mapping[str, Sequence[Scalar]]  # a tensor's name → its values

TOKEN_OUTPUTS = (contract.OUTPUT_LOG_PROBS, contract.OUTPUT_TOKENS, contract.TOP_LOG_PROBS)
ROW_OUTPUTS = tuple(spec for spec in contract.GENERATE.outputs if spec not in TOKEN_OUTPUTS)

# JSON may write a whole number without a point.
_KINDS: dict[DType, tuple[type, ...]] = {
    "STRING": (str,),
    "INT32": (int,),
    "INT64": (int,),
    "FP32": (float, int),
}


@dataclass(frozen=True)
class ToolCall:
    """A tool call; in a chunk, the new part of it."""

    index: int  # among the sequence's calls
    id: str | None  # in a chunk, only with the call's first part; likewise `name`
    name: str | None
    arguments: str  # JSON, in a chunk its next characters

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's form, as an assistant's message has it in `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Token:
    """One token. `token` is its text; where that isn't whole, as of a part of a character, `raw` has its bytes."""

    id: int
    token: str
    raw: bytes | None = None


@dataclass(frozen=True)
class TopLogProb:
    """One of a position's likeliest tokens, whose text and bytes are as in `Token`."""

    id: int
    token: str
    log_prob: float
    raw: bytes | None = None


@dataclass(frozen=True)
class Times:
    """The times of one sequence, in ns on the server's monotonic clock; 0: not yet."""

    arrival_ns: int
    first_scheduled_ns: int
    first_token_ns: int
    last_token_ns: int


@dataclass(frozen=True)
class Chunk:
    """What one response adds to one sequence: its text since the last response, and its state.

    Log probabilities are natural logarithms, one for each new token; `tokens` are these tokens. Both come where they
    were asked for. num_cached_tokens: of the prompt's tokens, those that weren't computed again; num_reasoning_tokens:
    of the new ones so far. Both come with the sequence's first chunk and its last, from a server that tells them.
    """

    text: str
    finish_reason: FinishReason | Literal[""]  # "" until the sequence's last chunk
    num_input_tokens: int
    num_output_tokens: int  # of the sequence so far
    sequence_index: int = 0  # 0 … num_return_sequences - 1
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    log_probs: tuple[float, ...] = ()
    top_log_probs: tuple[tuple[TopLogProb, ...], ...] = ()
    cum_log_prob: float | None = None  # of the sequence so far
    times: Times | None = None
    tokens: tuple[Token, ...] = ()
    num_cached_tokens: int | None = None
    num_reasoning_tokens: int | None = None


class ChunkReader:
    """Reads the responses to one request, and tells when the answer is complete."""

    def __init__(self, num_sequences: int) -> None:
        self._num_sequences = num_sequences
        self._num_tokens: dict[int, int] = {}  # of each sequence so far
        self._finished: set[int] = set()

    @property
    def is_complete(self) -> bool:
        """Whether every sequence has its `finish_reason`."""
        return len(self._finished) == self._num_sequences

    def read(self, outputs: Outputs) -> list[Chunk]:
        """Give the chunks of one response; `ProtocolError` for a malformed one."""
        columns = {spec: values for spec in ROW_OUTPUTS if (values := _values(outputs, spec)) is not None}
        for spec in contract.ALWAYS_OUTPUTS:
            if spec not in columns:
                raise ProtocolError(f"output {spec.name} is missing from a response with {sorted(outputs)}")
        num_rows = len(columns[contract.TEXT_OUTPUT])
        for spec, values in columns.items():
            if not values or len(values) != num_rows:
                raise ProtocolError(f"output {spec.name} must hold {max(num_rows, 1)} {spec.dtype}, got {values!r}")
        tokens = {spec: iter(values) for spec in TOKEN_OUTPUTS if (values := _values(outputs, spec)) is not None}
        chunks = [self._read_row({spec: columns[spec][i] for spec in columns}, tokens) for i in range(num_rows)]
        for spec, left in tokens.items():
            if rest := list(left):
                raise ProtocolError(f"output {spec.name} must hold a value for each new token, got {rest!r} beyond")
        return chunks

    def _read_row(self, row: dict[TensorSpec, Any], tokens: dict[TensorSpec, Iterator[Any]]) -> Chunk:
        """Read the values of one sequence; `tokens` gives those of its new tokens next."""
        index = row.get(contract.SEQUENCE_INDEX, 0)
        num_new = self._advance(index, row[contract.NUM_OUTPUT_TOKENS])
        new = {spec: list(islice(values, num_new)) for spec, values in tokens.items()}
        for spec, values in new.items():
            if len(values) != num_new:
                raise ProtocolError(f"output {spec.name} must hold a value for each new token, got too few")
        reason = row[contract.FINISH_REASON]
        if reason not in ("", *FINISH_REASONS):
            raise ProtocolError(f"finish_reason must be empty or one of {FINISH_REASONS}, got {reason!r}")
        if reason:
            self._finished.add(index)
        return Chunk(
            text=row[contract.TEXT_OUTPUT],
            finish_reason=reason,
            num_input_tokens=row[contract.NUM_INPUT_TOKENS],
            num_output_tokens=row[contract.NUM_OUTPUT_TOKENS],
            sequence_index=index,
            reasoning=row.get(contract.REASONING_OUTPUT, ""),
            tool_calls=_tool_calls(row.get(contract.TOOL_CALLS, "[]")),
            log_probs=tuple(new.get(contract.OUTPUT_LOG_PROBS, ())),
            top_log_probs=tuple(map(_top_log_probs, new.get(contract.TOP_LOG_PROBS, ()))),
            cum_log_prob=row.get(contract.CUM_LOG_PROBS),
            times=_times(row),
            tokens=tuple(map(_token, new.get(contract.OUTPUT_TOKENS, ()))),
            num_cached_tokens=row.get(contract.NUM_CACHED_TOKENS),
            num_reasoning_tokens=row.get(contract.NUM_REASONING_TOKENS),
        )

    def _advance(self, index: int, num_tokens: int) -> int:
        """The number of new tokens of sequence `index`."""
        if not 0 <= index < self._num_sequences:
            raise ProtocolError(
                f"output {contract.SEQUENCE_INDEX.name} must be 0 to {self._num_sequences - 1}, got {index!r}"
            )
        if index in self._finished:
            raise ProtocolError(f"a response came after the one with a finish_reason, of sequence {index}")
        before = self._num_tokens.get(index, 0)
        if num_tokens < before:
            raise ProtocolError(
                f"output {contract.NUM_OUTPUT_TOKENS.name} must not fall, got {num_tokens} after {before}"
            )
        self._num_tokens[index] = num_tokens
        return num_tokens - before


def _values(outputs: Outputs, spec: TensorSpec) -> list[Any] | None:
    """The values of one output, None where it is absent."""
    if spec.name not in outputs:
        return None
    values = outputs[spec.name]
    for value in values:
        if not isinstance(value, _KINDS[spec.dtype]) or isinstance(value, bool):
            raise ProtocolError(f"output {spec.name} must hold {spec.dtype}, got {value!r}")
    return [float(value) for value in values] if spec.dtype == "FP32" else list(values)


def _times(row: Mapping[TensorSpec, Any]) -> Times | None:
    times = [row.get(spec) for spec in contract.TIME_OUTPUTS]
    return None if None in times else Times(*times)  # type: ignore[arg-type]


def _tool_calls(text: str) -> tuple[ToolCall, ...]:
    """Read OpenAI's `delta.tool_calls`."""
    try:
        return tuple(
            ToolCall(call["index"], call.get("id"), call["function"].get("name"), call["function"]["arguments"])
            for call in json.loads(text)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ProtocolError(f"output {contract.TOOL_CALLS.name} must be a JSON list of calls, got {text!r}") from None


def _token(text: str) -> Token:
    try:
        row = json.loads(text)
        return Token(row["id"], row["token"], _raw(row))
    except (ValueError, KeyError, TypeError):
        raise ProtocolError(f"output {contract.OUTPUT_TOKENS.name} must be a JSON token, got {text!r}") from None


def _raw(row: Mapping[str, Any]) -> bytes | None:
    return bytes(row["bytes"]) if "bytes" in row else None


def _top_log_probs(text: str) -> tuple[TopLogProb, ...]:
    try:
        rows = json.loads(text)
        return tuple(TopLogProb(row["id"], row["token"], float(row["log_prob"]), _raw(row)) for row in rows)
    except (ValueError, KeyError, TypeError):
        raise ProtocolError(
            f"output {contract.TOP_LOG_PROBS.name} must be a JSON list of tokens, got {text!r}"
        ) from None
