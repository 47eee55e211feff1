"""Triton's adapter for the tokenizer: `text_input` or `messages` → `input_ids` and `prompt_info`.

A repository's model.py imports it. It only translates tensors and errors; `ensemble/text/tokenizer.py` handles text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import triton_python_backend_utils as pb_utils

from deepseek_triton.ensemble.models.tensors import RequestError, array, read_inputs, scalar
from deepseek_triton.ensemble.processes.watchdog import watch
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.progress import PromptInfo
from deepseek_triton.ensemble.text.errors import TextError, one_line
from deepseek_triton.ensemble.text.tokenizer import Ids, Prompt, Tokenizer

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Prepared(NamedTuple):
    """A valid request: its prompt, and what the later models must know of it."""

    prompt: Prompt
    info: PromptInfo


class TritonPythonModel:
    """Answers each request with one response, a batch at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that lies beside this file."""
        version = args["model_version"]
        self._tokenizer = Tokenizer.from_directory(Path(args["model_repository"]) / version)
        self._watchdog = watch(args["model_name"].removesuffix("-tokenizer"), version, "tokenizer")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode all requests at once; one that can't be encoded gets an error of its own."""
        prepared = [_attempt(self._prepare, request) for request in requests]
        encoded = iter(self._encode([entry.prompt for entry in prepared if isinstance(entry, Prepared)]))
        responses = []
        for entry in prepared:
            if isinstance(entry, Exception):
                responses.append(_failure(entry))
                continue
            ids = next(encoded)
            responses.append(_failure(ids) if isinstance(ids, Exception) else _response(ids, entry.info))
        return responses

    def finalize(self) -> None:
        """Stop watching."""
        self._watchdog.close()

    def _prepare(self, request: Any) -> Prepared:
        inputs = read_inputs(request)
        text, messages = scalar(inputs, contract.TEXT_INPUT), scalar(inputs, contract.MESSAGES)
        enable_thinking = scalar(inputs, contract.ENABLE_THINKING)
        separate_reasoning = scalar(inputs, contract.SEPARATE_REASONING)
        if (text is None) == (messages is None):
            raise RequestError("give either text_input or messages")
        if messages is not None:
            prompt = self._tokenizer.chat_prompt(messages, enable_thinking)
        elif enable_thinking is not None:
            raise RequestError("enable_thinking is for messages: with text_input, the text decides")
        else:
            prompt = self._tokenizer.text_prompt(text)
        # A prompt without a template keeps the reasoning in its text, unless the client asks for it apart.
        separates = bool(separate_reasoning) if messages is None else separate_reasoning is not False
        return Prepared(prompt, PromptInfo(prompt.is_reasoning_open, prompt.has_tools, separates))

    def _encode(self, prompts: list[Prompt]) -> Sequence[Ids | Exception]:
        try:
            return self._tokenizer.encode_prompts(prompts)
        except Exception:  # one bad prompt must not fail the whole batch
            return [_attempt(self._tokenizer.encode_prompt, prompt) for prompt in prompts]


def _attempt(function: Callable[[Any], Result], argument: Any) -> Result | Exception:
    try:
        return function(argument)
    except Exception as error:
        return error


def _failure(error: Exception) -> Any:
    if isinstance(error, RequestError | TextError):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
    log.error("a prompt can't be encoded", exc_info=error)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"the prompt can't be encoded: {one_line(error)}"))


def _response(ids: Ids, info: PromptInfo) -> Any:
    values = ((contract.INPUT_IDS, ids), (contract.PROMPT_INFO, info.to_json().encode()))
    return pb_utils.InferenceResponse([pb_utils.Tensor(spec.name, array(spec, value)) for spec, value in values])
