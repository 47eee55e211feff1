"""The JSON tensors that travel beside the token ids from model to model: PromptInfo and Progress.

The tokenizer writes a PromptInfo for the engine. The engine writes a Progress for the detokenizer, which makes the
client's outputs of it. One text tensor replaces a dozen small ones, since each tensor costs every response some 10 µs
in each model. This module knows nothing of Triton, of engines or of text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from deepseek_triton.ensemble.protocol.contract import FinishReason


@dataclass(frozen=True)
class PromptInfo:
    """What the detokenizer must know of a prompt to read its answer.

    is_reasoning_open: whether the prompt ends inside an open `<think>`; None: the model knows no reasoning.
    has_tools: whether the prompt offered tools, so that calls are looked for.
    separates_reasoning: whether the client wants reasoning apart from the text.
    arrived_at: when the request came to the tokenizer, in seconds on the machine's monotonic clock; None: unknown.
    """

    is_reasoning_open: bool | None = None
    has_tools: bool = False
    separates_reasoning: bool = True
    arrived_at: float | None = None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps([self.is_reasoning_open, self.has_tools, self.separates_reasoning, self.arrived_at])

    @classmethod
    def from_json(cls, text: str | bytes) -> PromptInfo:
        """What `to_json` wrote.

        Raises:
            ValueError: it is something else, from a client that calls the engine directly.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if (
            not isinstance(values, list)
            or len(values) != 4
            or not all(v is None or v is True or v is False for v in values[:3])
            or not (values[3] is None or isinstance(values[3], float))
        ):
            raise ValueError(f"prompt_info is {text[:40]!r}, must be what the tokenizer gives; leave it out")
        return cls(values[0], bool(values[1]), bool(values[2]), values[3])


@dataclass(frozen=True)
class StreamHead:
    """What the detokenizer must know before a stream's first token; it travels with the first response.

    input_ids: the prompt's ids where the text begins with the prompt (`exclude_input_in_output` is false), else none.
    counts_new_tokens: `num_output_tokens` counts each response's own tokens; else the sequence's so far.
    batch_index: the prompt's index in its request, where the client reads it.
    tells_details: the client reads the cached and the reasoning tokens' numbers, and which tokens have come.
    """

    info: PromptInfo
    input_ids: tuple[int, ...] = ()
    counts_new_tokens: bool = False
    batch_index: int | None = None
    tells_details: bool = False

    def to_values(self) -> list[Any]:
        """The values that `from_values` reads, as JSON has them."""
        return [self.info.to_json(), self.input_ids, self.counts_new_tokens, self.batch_index, self.tells_details]

    @classmethod
    def from_values(cls, values: list[Any]) -> StreamHead:
        """What `to_values` gave."""
        info, input_ids, counts_new_tokens, batch_index, tells_details = values
        return cls(PromptInfo.from_json(info), tuple(input_ids), counts_new_tokens, batch_index, tells_details)


@dataclass(frozen=True)
class LogProbs:
    """Natural logarithms of probabilities.

    tokens: one for each new token. total: their sum over the sequence so far. top: for each new token, the ids and log
    probabilities of the likeliest tokens in its place.
    """

    tokens: tuple[float, ...]
    total: float
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True)
class Update:
    """The new tokens of one sequence; `ids` travel in the tensor `output_ids`.

    num_cut_chars: the number of characters to cut from the end of the whole text, for they belong to a stop word.
    times_ns: arrival, first scheduled, first token, last token, on the server's monotonic clock.
    num_cached_tokens: of the prompt's tokens, those that were found in a cache. num_reasoning_tokens: of the new ones
    so far, those of the reasoning.
    """

    index: int
    ids: tuple[int, ...]
    num_output_tokens: int
    finish_reason: FinishReason | None = None
    num_cut_chars: int = 0
    log_probs: LogProbs | None = None
    times_ns: tuple[int, int, int, int] | None = None
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0


@dataclass(frozen=True)
class Progress:
    """One response of the engine. Without updates it is a heartbeat, which no client sees.

    num_input_tokens and shows_output_tokens: None and False where the client doesn't want the numbers.
    shows_index: the request has several sequences.
    is_last: nothing follows, of any of its sequences.
    """

    stream_id: int
    updates: tuple[Update, ...] = ()
    head: StreamHead | None = None
    num_input_tokens: int | None = None
    shows_output_tokens: bool = True
    shows_index: bool = False
    is_last: bool = False

    @property
    def ids(self) -> list[int]:
        """Every update's ids, concatenated."""
        return [token for update in self.updates for token in update.ids]

    def to_json(self) -> str:
        """One line of JSON, without the ids."""
        values: list[Any] = [self.stream_id, self.num_input_tokens, self.shows_output_tokens]
        values += [self.shows_index, self.is_last]
        values.append(None if self.head is None else self.head.to_values())
        for update in self.updates:
            log_probs = update.log_probs
            values.append([
                update.index, len(update.ids), update.num_output_tokens, update.finish_reason, update.num_cut_chars,
                None if log_probs is None else [log_probs.tokens, log_probs.total, log_probs.top], update.times_ns,
                update.num_cached_tokens, update.num_reasoning_tokens,
            ])  # fmt: skip
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes, ids: list[int]) -> Progress:
        """What `to_json` wrote, with the ids of the tensor beside it."""
        stream_id, num_input_tokens, shows_output_tokens, shows_index, is_last, head, *rows = json.loads(text)
        updates, start = [], 0
        for index, count, num_output_tokens, finish_reason, num_cut_chars, log_probs, times, *counts in rows:
            updates.append(
                Update(
                    index,
                    tuple(ids[start : start + count]),
                    num_output_tokens,
                    finish_reason,
                    num_cut_chars,
                    None if log_probs is None else _log_probs(*log_probs),
                    None if times is None else tuple(times),
                    *counts,
                )
            )
            start += count
        return cls(
            stream_id,
            tuple(updates),
            None if head is None else StreamHead.from_values(head),
            num_input_tokens,
            shows_output_tokens,
            shows_index,
            is_last,
        )


def _log_probs(tokens: list[float], total: float, top: list[list[list[Any]]]) -> LogProbs:
    return LogProbs(
        tuple(tokens), total, tuple(tuple((int(token), float(value)) for token, value in row) for row in top)
    )
