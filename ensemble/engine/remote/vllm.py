"""Ask a model of Triton's vLLM backend, from a Python model of the same server.

The backend gives texts. The ids come with `return_logprobs`: of each new token it gives a JSON object, id → log
probability, which begins with the token itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from deepseek_triton.ensemble.engine.remote.calls import Calls
from deepseek_triton.ensemble.engine.remote.model import RemoteError, RemoteTokens
from deepseek_triton.ensemble.sampling import Sampled
from deepseek_triton.ensemble.text.errors import one_line

TEXT, FINISH_REASON, LOG_PROBS = "text_output", "finish_reason", "logprobs"
FLAGS = ("stream", "exclude_input_in_output", "return_finish_reason", "return_logprobs")


class VllmModel:
    """Asks model `name`; `pb_utils` is `triton_python_backend_utils`. calls: the process's own."""

    def __init__(self, pb_utils: Any, name: str, calls: Calls) -> None:
        self._pb_utils, self._name, self._calls = pb_utils, name, calls

    def __call__(
        self, text: str, parameters: Mapping[str, Any], is_wanted: Callable[[], bool]
    ) -> Iterator[RemoteTokens]:
        """See Ask."""
        texts = {"text_input": text, "sampling_parameters": json.dumps(dict(parameters))}
        tensor = self._pb_utils.Tensor
        request = self._pb_utils.InferenceRequest(
            model_name=self._name,
            requested_output_names=[TEXT, FINISH_REASON, LOG_PROBS],
            inputs=[
                *(tensor(name, np.array([value.encode()], np.object_)) for name, value in texts.items()),
                *(tensor(name, np.array([True])) for name in FLAGS),
            ],
        )
        num_top = int(parameters["logprobs"])
        with self._calls.responses(request) as responses:
            for response in responses:
                if response.has_error():
                    raise RemoteError(f"vLLM: {one_line(response.error().message())}")
                found = {item.name(): item.as_numpy() for item in response.output_tensors()}
                if found:
                    yield read_tokens(found, num_top)
                if not is_wanted():
                    return


def read_tokens(outputs: Mapping[str, Any], num_top: int) -> RemoteTokens:
    """The tokens in one response's outputs, name → array, with `num_top` likeliest ones beside each.

    Raises:
        RemoteError: the response has no ids, or can't be read.
    """
    try:
        reason = _text(outputs[FINISH_REASON])
        entries = json.loads(_text(outputs[LOG_PROBS])) or []
        tokens = tuple(
            _sampled({int(token): item["logprob"] for token, item in row.items()}, num_top) for row in entries
        )
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        raise RemoteError(f"vLLM's response can't be read: {one_line(error)}") from error
    return RemoteTokens(tokens, None if reason in ("None", "") else reason)


def _sampled(log_probs: dict[int, float], num_top: int) -> Sampled:
    token = next(iter(log_probs))
    top = sorted(log_probs.items(), key=lambda item: -item[1])[:num_top]
    return Sampled(token, log_probs[token], tuple(top))


def _text(values: Any) -> str:
    value = values.reshape(-1)[0]
    return value.decode() if isinstance(value, bytes) else str(value)
