"""Triton's adapter for the tokenizer: `text_input` or `messages` → `input_ids`, and what is to be known of them.

A repository's model.py imports it. It translates tensors and errors, nothing else: text is
`ensemble/text.py`'s business.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from ensemble import contract
from ensemble.errors import TextError, one_line, utf8_text
from ensemble.models.tensors import RequestError, array, read_inputs, scalar
from ensemble.progress import PromptInfo
from ensemble.reasoning import opens_reasoning
from ensemble.siblings import watch
from ensemble.text import Tokenizer

log = logging.getLogger(__name__)


class TritonPythonModel:
    """One request in, one response out, many at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that lies beside this file."""
        version = args["model_version"]
        self._tokenizer = Tokenizer.from_directory(Path(args["model_repository"]) / version)
        self._watchdog = watch(args["model_name"].removesuffix("-tokenizer"), version, "tokenizer")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Encode every request; one that can't be encoded gets its own error."""
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Stop watching."""
        self._watchdog.close()

    def _respond(self, request: Any) -> Any:
        try:
            ids, info = self._encode(read_inputs(request))
        except (RequestError, TextError) as error:
            invalid = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=invalid)
        except Exception as error:  # must not cost the others of the batch their answers
            log.error("a prompt can't be encoded", exc_info=error)
            internal = pb_utils.TritonError(f"the prompt can't be encoded: {one_line(error)}")
            return pb_utils.InferenceResponse(error=internal)
        values = ((contract.INPUT_IDS, ids), (contract.PROMPT_INFO, info.to_json().encode()))
        return pb_utils.InferenceResponse([pb_utils.Tensor(spec.name, array(spec, value)) for spec, value in values])

    def _encode(self, inputs: dict[str, NDArray[Any]]) -> tuple[Any, PromptInfo]:
        text, messages = scalar(inputs, contract.TEXT_INPUT), scalar(inputs, contract.MESSAGES)
        enable_thinking = scalar(inputs, contract.ENABLE_THINKING)
        separate_reasoning = scalar(inputs, contract.SEPARATE_REASONING)
        if (text is None) == (messages is None):
            raise RequestError("give either text_input or messages")
        if messages is None:
            if enable_thinking is not None:
                raise RequestError("enable_thinking is for messages: with text_input, the text decides")
            return self._tokenizer.encode(text), _text_info(text, bool(separate_reasoning))
        chat = self._tokenizer.encode_chat(messages, enable_thinking)
        return chat.ids, PromptInfo(chat.is_reasoning_open, chat.has_tools, separate_reasoning is not False)


def _text_info(text: bytes, separates_reasoning: bool) -> PromptInfo:
    """A text that is continued as it is keeps its reasoning in it, unless the client says otherwise."""
    is_open = opens_reasoning(utf8_text(text, contract.TEXT_INPUT.name))
    return PromptInfo(is_open, separates_reasoning=separates_reasoning)
