"""Converts one stream's updates from the engine into a client's output tensors.

It detokenizes incrementally, cuts stop words off and separates reasoning and tool calls. It keeps the state of each of
the stream's sequences between responses. It knows nothing of Triton.
"""

from __future__ import annotations

import json
from typing import Any

from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec
from deepseek_triton.ensemble.protocol.progress import LogProbs, Progress, PromptInfo, StreamHead, Update
from deepseek_triton.ensemble.text.channels import Channels, ChannelSplitter
from deepseek_triton.ensemble.text.tokenizer import IncrementalDetokenizer, Tokenizer

StreamOutputs = dict[TensorSpec, list[Any]]  # a tensor's values


class Stream:
    """The outputs of one request.

    Args:
        head: the StreamHead of the first response; None if that response was missed.
    """

    def __init__(self, tokenizer: Tokenizer, head: StreamHead | None) -> None:
        self._tokenizer = tokenizer
        self._head = head or StreamHead(PromptInfo())
        self._sequences: dict[int, _Sequence] = {}

    def push(self, progress: Progress) -> StreamOutputs:
        """Return the tensors of one response, with one value for each of `progress.updates`."""
        outputs: StreamOutputs = {contract.TEXT_OUTPUT: [], contract.FINISH_REASON: []}
        for update in progress.updates:
            self._push(update, outputs)
        _add_counts(progress, self._head, outputs)
        if self._head.tells_details and any(map(_is_first_or_last, progress.updates)):
            outputs[contract.NUM_CACHED_TOKENS] = [update.num_cached_tokens for update in progress.updates]
            outputs[contract.NUM_REASONING_TOKENS] = [update.num_reasoning_tokens for update in progress.updates]
        return outputs

    def _push(self, update: Update, outputs: StreamOutputs) -> None:
        sequence = self._sequences.get(update.index)
        if sequence is None:
            sequence = self._sequences[update.index] = _Sequence(self._tokenizer, self._head)
        is_final = update.finish_reason is not None
        if is_final:
            del self._sequences[update.index]
        text, channels = sequence.push(update)
        outputs[contract.TEXT_OUTPUT].append((text + channels.text).encode())
        outputs[contract.FINISH_REASON].append((update.finish_reason or "").encode())
        if sequence.has_reasoning:
            outputs.setdefault(contract.REASONING_OUTPUT, []).append(channels.reasoning.encode())
        if sequence.has_tools:
            calls = [delta.as_openai() for delta in channels.tool_calls]
            outputs.setdefault(contract.TOOL_CALLS, []).append(json.dumps(calls, ensure_ascii=False).encode())
        if update.log_probs is not None:
            _add_log_probs(self._tokenizer, update.log_probs, outputs)
            if self._head.tells_details:
                tokens = (json.dumps(token_form(self._tokenizer, token), ensure_ascii=False) for token in update.ids)
                outputs.setdefault(contract.OUTPUT_TOKENS, []).extend(token.encode() for token in tokens)
        for spec, time_ns in zip(contract.TIME_OUTPUTS, update.times_ns or (), strict=False):
            outputs.setdefault(spec, []).append(time_ns)


class _Sequence:
    """The detokenizer and the channels of one sequence."""

    def __init__(self, tokenizer: Tokenizer, head: StreamHead) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._input_text = self._detokenizer.push(head.input_ids) if head.input_ids else ""
        tool_format = tokenizer.tool_format if head.info.has_tools else None
        self.has_tools = tool_format is not None
        is_reasoning_open = head.info.is_reasoning_open if head.info.separates_reasoning else None
        self.has_reasoning = is_reasoning_open is not None
        self._channels = ChannelSplitter(is_reasoning_open, tool_format)

    def push(self, update: Update) -> tuple[str, Channels]:
        """Return the echoed prompt (in the first update, if requested) and the increment of each channel."""
        is_final = update.finish_reason is not None
        text = self._detokenizer.push(update.ids, final=is_final)
        if update.num_cut_chars:
            text = text[: -update.num_cut_chars]
        input_text, self._input_text = self._input_text, ""
        return input_text, self._channels.push(text, final=is_final)


def token_form(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    """A token as clients read it; its bytes stand there where they are no whole text."""
    text = tokenizer.token_text(token)
    form = {"id": token, "token": text}
    return {**form, "bytes": list(tokenizer.token_bytes(token))} if "\ufffd" in text else form


def _is_first_or_last(update: Update) -> bool:
    return update.finish_reason is not None or update.num_output_tokens == len(update.ids)


def _add_counts(progress: Progress, head: StreamHead, outputs: StreamOutputs) -> None:
    updates = progress.updates
    if progress.num_input_tokens is not None:
        outputs[contract.NUM_INPUT_TOKENS] = [progress.num_input_tokens] * len(updates)
    if progress.shows_output_tokens:
        outputs[contract.NUM_OUTPUT_TOKENS] = [
            len(update.ids) if head.counts_new_tokens else update.num_output_tokens for update in updates
        ]
    if progress.shows_index:
        outputs[contract.SEQUENCE_INDEX] = [update.index for update in updates]
    if head.batch_index is not None:
        outputs[contract.BATCH_INDEX] = [head.batch_index] * len(updates)


def _add_log_probs(tokenizer: Tokenizer, log_probs: LogProbs, outputs: StreamOutputs) -> None:
    """Append the log probabilities. Those of a response's sequences are concatenated, as their tokens are."""
    outputs.setdefault(contract.OUTPUT_LOG_PROBS, []).extend(log_probs.tokens)
    outputs.setdefault(contract.CUM_LOG_PROBS, []).append(log_probs.total)
    if log_probs.top:
        rows = [[{**token_form(tokenizer, token), "log_prob": value} for token, value in row] for row in log_probs.top]
        outputs.setdefault(contract.TOP_LOG_PROBS, []).extend(
            json.dumps(row, ensure_ascii=False).encode() for row in rows
        )
