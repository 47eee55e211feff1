"""The tensors of a request → `RequestOptions`.

The table of request options says which field each tensor fills. Ranges are checked where the fields live; this module
converts values, and checks what is lost on the way.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.admission import RequestOptions
from deepseek_triton.ensemble.models.tensors import RequestError, scalar
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec
from deepseek_triton.ensemble.protocol.progress import PromptInfo
from deepseek_triton.ensemble.protocol.request_options import RANGES, REQUEST_OPTIONS, RequestOption
from deepseek_triton.ensemble.sampling import SamplingParams
from deepseek_triton.ensemble.text.errors import utf8_text


def _options_of(kind: type[SamplingParams | RequestOptions]) -> tuple[RequestOption, ...]:
    """The request options that are a field of `kind`."""
    names = {field.name for field in fields(kind)}
    return tuple(option for option in REQUEST_OPTIONS if option.field in names)


PARAMS = _options_of(SamplingParams)
OPTIONS = _options_of(RequestOptions)


def read_options(inputs: dict[str, NDArray[Any]]) -> RequestOptions:
    """What the request's tensors, name → array, ask for.

    Raises:
        RequestError, ValueError: one has the wrong shape or a value out of range.
    """
    info = _text(inputs, contract.PROMPT_INFO)
    return RequestOptions(
        params=SamplingParams(**_read(inputs, PARAMS), num_log_probs=_num_log_probs(inputs)),
        prompt_info=None if info is None else PromptInfo.from_json(info),
        **_read(inputs, OPTIONS),
    )


def _read(inputs: dict[str, NDArray[Any]], options: tuple[RequestOption, ...]) -> dict[str, Any]:
    """Field → value, of those options that the request has."""
    values = {option.field: _value(inputs, option) for option in options}
    return {field: value for field, value in values.items() if value is not None}


def _value(inputs: dict[str, NDArray[Any]], option: RequestOption) -> Any:
    """The value of one option; None where it is absent."""
    if option.is_list:
        return _texts(inputs, option.tensor)
    if option.dtype == "STRING":
        return _text(inputs, option.tensor) or None  # NVIDIA's clients send an empty text for none
    return scalar(inputs, option.tensor)


def _num_log_probs(inputs: dict[str, NDArray[Any]]) -> int | None:
    """How many likeliest tokens to report; 0: the chosen one alone, None: none at all."""
    spec = contract.OPTIONS["num_top_log_probs"]
    num_top = scalar(inputs, spec) or 0
    if not RANGES[spec.name].holds(num_top):
        raise RequestError(f"{spec.name} is {num_top}, must be {RANGES[spec.name].broken_rule(num_top)}")
    return num_top if num_top or scalar(inputs, contract.OPTIONS["return_log_probs"]) else None


def _text(inputs: dict[str, NDArray[Any]], spec: TensorSpec) -> str | None:
    value = scalar(inputs, spec)
    return None if value is None else utf8_text(value, spec.name)


def _texts(inputs: dict[str, NDArray[Any]], spec: TensorSpec) -> tuple[str, ...] | None:
    """All values of a text tensor. NVIDIA's clients send one empty text for none."""
    if spec.name not in inputs:
        return None
    texts = tuple(utf8_text(value, spec.name) for value in inputs[spec.name].reshape(-1))
    if len(texts) > 1 and "" in texts:
        raise RequestError(f"{spec.name} holds an empty text; leave it out")
    return () if texts == ("",) else texts
