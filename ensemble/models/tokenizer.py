"""Triton's adapter for the tokenizer: `text_input` or `messages` → `input_ids` and `prompt_info`.

A repository's model.py imports it. It only translates tensors and errors; `ensemble/text/tokenizer.py` handles text.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from deepseek_triton.ensemble.artefacts.manifest import FILE_NAME as MANIFEST_NAME
from deepseek_triton.ensemble.artefacts.manifest import Manifest, loaded_identity
from deepseek_triton.ensemble.models.fields import check_fields
from deepseek_triton.ensemble.models.tensors import (
    RequestError,
    array,
    asks_for_build,
    marks_kind,
    padded,
    read_inputs,
    rows,
    scalar,
)
from deepseek_triton.ensemble.processes.low_priority import BusyError, LowPriorityPool
from deepseek_triton.ensemble.processes.seal import Seal, model_seal
from deepseek_triton.ensemble.processes.watchdog import watch
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.error_kind import ERROR_CODES, FailureKind, with_kind
from deepseek_triton.ensemble.protocol.pipelines import ENGINE_SUFFIX, model_name
from deepseek_triton.ensemble.protocol.progress import PromptInfo
from deepseek_triton.ensemble.text.errors import TextError, one_line, without_frames
from deepseek_triton.ensemble.text.tokenizer import Ids, Prompt, Tokenizer

log = logging.getLogger(__name__)
Result = TypeVar("Result")
WARM_UP = '[{"role": "user", "content": "Hello"}]'


# A request with at most so many bytes of prompt is encoded with the others of its batch, in some milliseconds. A longer
# one may take seconds: it has threads of its own, which yield the CPU.
QUICK_BYTES = 32_768
NUM_QUICK_THREADS = 2
NUM_SLOW_THREADS = 2
MAX_SLOW_WAITING = 64


class Job(NamedTuple):
    """A request that was read: where its answer goes, and when it came, in seconds on the monotonic clock.

    marks_kind: whether an error's text begins with its kind.
    """

    sender: Any
    inputs: dict[str, NDArray[Any]]
    arrived_at: float
    marks_kind: bool


class Prepared(NamedTuple):
    """A valid request: its prompt, and what the later models must know of it."""

    prompt: Prompt
    info: PromptInfo


class TritonPythonModel:
    """Answers each request with one response, from threads of its own: no request waits for the encoding of another."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer that lies beside this file."""
        # The threads here take the place of the library's own, which all its callers would share.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        version, directory = args["model_version"], Path(args["model_repository"])
        name = args["model_name"].removesuffix("-tokenizer")
        self._tokenizer = Tokenizer.from_directory(directory / version, max_prompt_tokens(directory, name, version))
        with contextlib.suppress(TextError):  # starts the process that renders; a template may take no such chat
            self._tokenizer.encode_messages(WARM_UP)
        self._identity = loaded_identity(args)
        self._seal = model_seal(name, version)
        self._quick = ThreadPoolExecutor(NUM_QUICK_THREADS, thread_name_prefix="tokenizer")
        self._slow = LowPriorityPool(NUM_SLOW_THREADS, MAX_SLOW_WAITING, "tokenizer")
        self._watchdog = watch(name, version, "tokenizer")

    def execute(self, requests: list[Any]) -> None:
        """Take every request; its answer comes later."""
        now = time.monotonic()
        quick: list[Job] = []
        for request in requests:
            sender = request.get_response_sender()
            try:
                check_fields(request, contract.ENSEMBLE.inputs)
                if asks_for_build(request):
                    text = pb_utils.Tensor(contract.PROMPT_INFO.name, array(contract.PROMPT_INFO, self._identity))
                    _send(sender, pb_utils.InferenceResponse([text]))
                    continue
                job = Job(sender, read_inputs(request), now, marks_kind(request))
                if _prompt_bytes(job.inputs) <= QUICK_BYTES:
                    quick.append(job)
                else:
                    self._slow.submit(partial(self._answer, [job]))
            except Exception as error:
                _send(sender, _failure(_noted(error), is_marked=marks_kind(request)))
        if quick:
            self._quick.submit(self._answer, quick)

    def finalize(self) -> None:
        """Stop watching, and end the threads."""
        self._watchdog.close()
        self._quick.shutdown()
        self._slow.close()

    def _answer(self, jobs: list[Job]) -> None:
        """Encode all jobs at once, and send the answers; one that can't be encoded gets an error of its own."""
        prepared = [_attempt(self._prepare_all, job) for job in jobs]
        valid = [entry for entries in prepared if not isinstance(entries, Exception) for entry in entries]
        encoded = iter(self._encode([entry.prompt for entry in valid]))
        for job, entries in zip(jobs, prepared, strict=True):
            if isinstance(entries, Exception):
                _send(job.sender, _failure(entries, is_marked=job.marks_kind))
                continue
            prompts = [next(encoded) for _ in entries]
            ids = [prompt for prompt in prompts if not isinstance(prompt, Exception)]
            errors = [prompt for prompt in prompts if isinstance(prompt, Exception)]
            failure = _failure(errors[0], is_marked=job.marks_kind) if errors else None
            _send(job.sender, failure or _response(ids, entries, self._seal))

    def _prepare_all(self, job: Job) -> list[Prepared]:
        """Each of the request's prompts."""
        return [self._prepare(row.inputs, job.arrived_at) for row in rows(job.inputs)]

    def _prepare(self, inputs: dict[str, Any], arrived_at: float) -> Prepared:
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
        return Prepared(prompt, PromptInfo(prompt.is_reasoning_open, prompt.has_tools, separates, arrived_at))

    def _encode(self, prompts: list[Prompt]) -> Sequence[Ids | Exception]:
        try:
            return self._tokenizer.encode_prompts(prompts)
        except Exception:  # one bad prompt must not fail the whole batch
            return [_attempt(self._tokenizer.encode_prompt, prompt) for prompt in prompts]


def _attempt(function: Callable[[Any], Result], argument: Any) -> Result | Exception:
    try:
        return function(argument)
    except Exception as error:
        return _noted(error)


def _noted(error: Exception) -> Exception:
    """The error, to be kept; one that isn't the client's fault is logged."""
    if not isinstance(error, BusyError | RequestError | TextError):
        log.error("a prompt can't be encoded", exc_info=error)
    return without_frames(error)


def max_prompt_tokens(directory: Path, name: str, version: str) -> int | None:
    """The engine's context in tokens, by the manifest in the engine's directory; None if it isn't there."""
    engine = directory.parent / model_name(name, ENGINE_SUFFIX) / version
    return Manifest.load(engine).max_seq_len if (engine / MANIFEST_NAME).exists() else None


def _prompt_bytes(inputs: dict[str, NDArray[Any]]) -> int:
    texts = (inputs[spec.name].reshape(-1) for spec in (contract.TEXT_INPUT, contract.MESSAGES) if spec.name in inputs)
    return sum(len(text) for values in texts for text in values)


def _send(sender: Any, response: Any) -> None:
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception as error:  # the client has gone, or the server ends
        log.error("a prompt's ids can't be sent", exc_info=error)


def _failure(error: Exception, *, is_marked: bool) -> Any:
    """The response that says what is wrong; `is_marked`: its text begins with the error's kind."""
    kind: FailureKind = "internal"
    if isinstance(error, BusyError):
        kind, message = "unavailable", str(error)
    elif isinstance(error, RequestError | TextError):
        kind, message = "invalid", str(error)
    else:
        message = f"the prompt can't be encoded: {one_line(error)}"
    text = with_kind(message, kind) if is_marked else message
    code = getattr(pb_utils.TritonError, ERROR_CODES[kind])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))


def _response(prompts: Sequence[Ids], entries: Sequence[Prepared], seal: Seal) -> Any:
    """The ids [prompts, longest] and, sealed, what the later models must know of each prompt [prompts, 1]."""
    sealed = [
        [seal.close(entry.info.to_json().encode(), ids.tobytes())] for ids, entry in zip(prompts, entries, strict=True)
    ]
    ids = padded(prompts) if len(prompts) > 1 else array(contract.INPUT_IDS, prompts[0])
    tensors = ((contract.INPUT_IDS, ids), (contract.PROMPT_INFO, np.array(sealed, np.object_)))
    return pb_utils.InferenceResponse([pb_utils.Tensor(spec.name, values) for spec, values in tensors])
