"""Triton's adapter for the engine: requests in, decoupled responses out.

A repository's model.py imports it. It translates tensors and errors and owns the loop. Scheduling is in
`ensemble/engine`; this model handles token ids, never text.
"""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.admission import Admission
from deepseek_triton.ensemble.engine.loop import EngineLoop
from deepseek_triton.ensemble.engine.remote.admission import RemoteAdmission
from deepseek_triton.ensemble.engine.remote.calls import Calls
from deepseek_triton.ensemble.engine.remote.loop import RemoteLoop
from deepseek_triton.ensemble.engine.remote.model import RemoteModel
from deepseek_triton.ensemble.engine.remote.vllm import VllmModel
from deepseek_triton.ensemble.engine.request_loop import QueueFullError, RequestLoop
from deepseek_triton.ensemble.engine.runners.load import load_model
from deepseek_triton.ensemble.engine.sequence import Request
from deepseek_triton.ensemble.models.metrics import MetricsPublisher
from deepseek_triton.ensemble.models.options import own_names, read_options, reads_batch_index
from deepseek_triton.ensemble.models.sinks import AnswerForm, Responses, TritonSink
from deepseek_triton.ensemble.models.tensors import (
    RequestError,
    Row,
    came_over_grpc,
    marks_kind,
    parameters,
    read_inputs,
    rows,
    scalar,
    without_padding,
)
from deepseek_triton.ensemble.processes.acknowledgements import AcknowledgementReceiver, pipe_path
from deepseek_triton.ensemble.processes.low_priority import BusyError, LowPriorityPool
from deepseek_triton.ensemble.processes.seal import SealError, model_seal
from deepseek_triton.ensemble.processes.watchdog import watch
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.pipelines import VLLM_SUFFIX, model_name
from deepseek_triton.ensemble.protocol.settings import EngineSettings, SettingsError
from deepseek_triton.ensemble.text.errors import one_line

log = logging.getLogger(__name__)

MAX_COMPILING = 64  # requests that may wait for a guide at once, most of them for the same or a quick one
MAX_WAITING_GUIDES = 256  # requests that may wait behind these


class TritonPythonModel:
    """A decoupled model: `execute` queues requests and returns; the loop's thread answers them."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the artefacts that lie beside this file and start the loop."""
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
        version = args["model_version"]
        directory = Path(args["model_repository"]) / version
        try:
            settings = EngineSettings.from_model_config(args["model_config"])
        except SettingsError:
            Manifest.load(directory)  # raises if an earlier version, which had other settings, built the model
            raise
        served_name = args["model_name"].removesuffix("-engine")
        manifest, runner = load_model(directory, settings)
        self._max_seq_len = runner.max_seq_len
        self._sampling = manifest.sampling
        self._acknowledgements = AcknowledgementReceiver(pipe_path(served_name, version))
        self._seal = model_seal(served_name, version)
        self._compilers = LowPriorityPool(MAX_COMPILING, MAX_WAITING_GUIDES, "guide compiler")
        self._calls = Calls()
        admission: type[Admission] = Admission
        if isinstance(runner, RemoteModel):
            admission = RemoteAdmission
            ask = VllmModel(pb_utils, model_name(served_name, VLLM_SUFFIX), self._calls)
            self._loop: RequestLoop = RemoteLoop(
                runner, ask, settings=settings, acknowledgements=self._acknowledgements
            )
        else:
            self._loop = EngineLoop(runner, settings=settings, acknowledgements=self._acknowledgements)
        self._admission = admission(directory, runner.vocab_size, manifest.end_ids, settings)
        self._loop.start()
        self._watchdog = watch(served_name, version, "engine", self._loop.is_healthy)
        labels = {"model": served_name, "version": version}
        self._metrics = MetricsPublisher(
            self._loop.metrics, pb_utils.MetricFamily, labels, has_trt_llm_names=settings.nv_trt_llm_metrics
        )
        self._metrics.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue every request; an invalid one is answered at once with its error."""
        for request in requests:
            responses = Responses(request.get_response_sender(), marks_kind=marks_kind(request))
            _answer_errors(responses, partial(self._accept, request, responses))

    def finalize(self) -> None:
        """End the running requests and the threads."""
        self._watchdog.close()
        self._compilers.close()
        self._loop.close()
        self._calls.close()
        self._admission.close()
        self._metrics.close()
        self._acknowledgements.close()

    def _accept(self, request: Any, responses: Responses) -> None:
        inputs = read_inputs(request)
        if scalar(inputs, contract.STOP):
            if not request.request_id():
                raise RequestError("stop needs the id of the request to stop")
            self._loop.stop(request.request_id(), stop_key(request), TritonSink(responses).send_stopped)
            return
        if scalar(inputs, contract.DESCRIBE):
            responses.send_description(self._max_seq_len)
            return
        prompts = [self._read(request, row, responses) for row in rows(inputs)]
        responses.num_prompts = len(prompts)

        def submit() -> None:
            for prompt in [make() for make, _ in prompts]:
                self._loop.submit(prompt)

        if all(is_quick for _, is_quick in prompts):
            submit()
        else:
            self._compilers.submit(lambda: _answer_errors(responses, submit))

    def _read(self, request: Any, row: Row, responses: Responses) -> tuple[Callable[[], Request], bool]:
        """What makes the request of one prompt, and whether that is quick: it has no guide to compile."""
        inputs = own_names(row.inputs)
        if contract.INPUT_IDS.name not in inputs:
            raise RequestError("input_ids is missing")
        ids = inputs[contract.INPUT_IDS.name].reshape(-1)
        ids = without_padding(ids) if row.is_one_of_several else ids
        self._open_prompt_info(inputs, ids)
        options = read_options(inputs, self._sampling)
        self._loop.check_prompt(ids)
        is_direct = options.prompt_info is None
        num_sequences = options.params.num_return_sequences
        key = stop_key(request)
        form = AnswerForm(
            # Triton's HTTP `generate` takes one response and no more.
            is_apart=num_sequences > 1 and not is_direct and came_over_grpc(request),
            # This project's clients read the sequence's count so far, and always send a key; others add up.
            counts_new_tokens=bool(scalar(inputs, contract.OPTIONS["return_num_output_tokens"]) or not key),
            tells_details=bool(key),
            batch_index=row.index if row.is_one_of_several or reads_batch_index(row.inputs) else None,
        )
        make = partial(
            self._admission.make_request,
            # Nobody can guess the id of another's stream, nor does a restarted engine continue an old one.
            stream_id=secrets.randbits(64),
            request_id=request.request_id(),
            stop_key=key,
            prompt_ids=ids.astype(np.int64),
            options=options,
            sink=TritonSink(responses, form, seal=None if is_direct else self._seal),
            now=self._loop.clock(),
        )
        return make, self._admission.is_quick(options)

    def _open_prompt_info(self, inputs: dict[str, Any], ids: NDArray[Any]) -> None:
        """Replace the sealed prompt info by what the tokenizer wrote, which no client could write."""
        name = contract.PROMPT_INFO.name
        if name not in inputs:
            return
        try:
            text = self._seal.open(scalar(inputs, contract.PROMPT_INFO), ids.astype(np.int32).tobytes())
        except SealError as error:
            raise RequestError("prompt_info must be what the tokenizer gives; leave it out") from error
        inputs[name] = np.array([text], np.object_)


def stop_key(request: Any) -> str:
    """The request's parameter `stop_key`: what a later request to stop it must have too."""
    value = parameters(request).get(contract.STOP_KEY)
    return value if isinstance(value, str) else ""


def _answer_errors(responses: Responses, accept: Callable[[], None]) -> None:
    """Call `accept`, and answer the request with its error if there is one."""
    try:
        accept()
    except (QueueFullError, BusyError) as error:
        responses.fail(str(error), "unavailable")
    except ValueError as error:
        responses.fail(one_line(error), "invalid")
    except Exception as error:  # this request needs an answer, and the next ones their turn
        log.error("a request can't be taken in", exc_info=error)
        responses.fail(f"the request can't be taken in: {one_line(error)}", "internal")
