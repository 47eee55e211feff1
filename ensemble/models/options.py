"""The tensors of a request → `RequestOptions`.

The table of request options says which field each tensor fills. Ranges are checked where the fields live; this module
converts values, and checks what is lost on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.admission import RequestOptions
from deepseek_triton.ensemble.guided.grammar import MAX_GUIDE_BYTES
from deepseek_triton.ensemble.models.tensors import RequestError, scalar
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.compatible_options import COMPATIBLE_BY_NAME, CompatibleOption
from deepseek_triton.ensemble.protocol.contract import TensorSpec
from deepseek_triton.ensemble.protocol.progress import PromptInfo
from deepseek_triton.ensemble.protocol.request_options import RANGES, REQUEST_OPTIONS, RequestOption
from deepseek_triton.ensemble.protocol.vllm_parameters import vllm_fields
from deepseek_triton.ensemble.sampling import SamplingParams
from deepseek_triton.ensemble.text.errors import check_size, utf8_text
from deepseek_triton.ensemble.text.word_finder import MAX_CHARACTERS


def _options_of(kind: type[SamplingParams | RequestOptions]) -> tuple[RequestOption, ...]:
    """The request options that are a field of `kind`."""
    names = {field.name for field in fields(kind)}
    return tuple(option for option in REQUEST_OPTIONS if option.field in names)


VLLM_PARAMETERS = COMPATIBLE_BY_NAME["sampling_parameters"].tensor
# Texts are measured before they are read. Guides, stop words and bad words have narrower limits where they are used.
MAX_TEXT_BYTES = {
    "guided_decoding_guide": max(MAX_GUIDE_BYTES.values()),
    VLLM_PARAMETERS.name: 4 * max(MAX_GUIDE_BYTES.values()),
    contract.PROMPT_INFO.name: 4096,
}
MAX_NAME_BYTES = 256  # of a text that is one of a few names
MAX_WORD_BYTES = 4 * MAX_CHARACTERS  # of all words together
MAX_WORDS = 4096
PARAMS = _options_of(SamplingParams)
OPTIONS = _options_of(RequestOptions)


def own_names(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """`inputs` under this project's names: aliases renamed, values that mean «not set» left out.

    Raises:
        RequestError: an input that isn't here has a value that would change the answer, or an option is given under
            two names.
    """
    own = dict(inputs)
    for name in inputs.keys() & COMPATIBLE_BY_NAME.keys():
        option = COMPATIBLE_BY_NAME[name]
        if not option.alias_of:
            _check_neutral(option, own.pop(name))
        elif option.alias_of != name:
            if option.alias_of in inputs:
                raise RequestError(f"{option.alias_of} is given and {name}, its older name; give one of them")
            own[option.alias_of] = own.pop(name)
    is_nvidias = reads_batch_index(inputs)
    if contract.PROMPT_INFO.name in inputs:  # a direct call of the engine is no old client's
        _drop_unset(own, is_nvidias)
    if is_nvidias and scalar(own, contract.STREAM):
        own.pop("exclude_input_in_output", None)  # NVIDIA's streams never begin with the prompt
    return own


def reads_batch_index(inputs: dict[str, NDArray[Any]]) -> bool:
    """Whether the request is one of NVIDIA's clients', which always send `beam_width` and some read `batch_index`."""
    return "beam_width" in inputs


def _check_neutral(option: CompatibleOption, values: NDArray[Any]) -> None:
    """Check that the input changes nothing."""
    given = [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values.reshape(-1)]
    if all(value in option.neutral or value == "" for value in given):
        return
    shown = ", ".join(repr(value.item() if isinstance(value, np.generic) else value) for value in given[:3])
    allowed = " or ".join(str(value).lower() for value in option.neutral)
    what = f"must be {allowed}, or left out" if allowed else "must be left out"
    raise RequestError(f"{option.tensor_name} is {shown[:60]}, {what}: {option.meaning}")


def _drop_unset(inputs: dict[str, NDArray[Any]], is_nvidias: bool) -> None:
    """Take zeros as NVIDIA's engines do: no penalty, no `top_p`. Without `top_k` and `top_p` the likeliest token comes.

    Several answers are sampled all the same: NVIDIA's would be equal.
    """
    if scalar(inputs, contract.OPTIONS["repetition_penalty"]) == 0.0:
        del inputs["repetition_penalty"]
    if is_zero := scalar(inputs, contract.OPTIONS["top_p"]) == 0.0:
        del inputs["top_p"]
    is_unset = (is_zero or is_nvidias) and "top_p" not in inputs and not scalar(inputs, contract.OPTIONS["top_k"])
    if is_unset and (scalar(inputs, contract.OPTIONS["num_return_sequences"]) or 1) == 1:
        inputs["temperature"] = np.zeros((1, 1), np.float32)


def read_options(inputs: dict[str, NDArray[Any]], proposed: Mapping[str, float] | None = None) -> RequestOptions:
    """What the request's tensors, name → array, ask for.

    proposed: field of SamplingParams → what the checkpoint proposes for it, which holds where the request is silent.

    Raises:
        RequestError, ValueError: one has the wrong shape or a value out of range.
    """
    info = _text(inputs, contract.PROMPT_INFO)
    vllm = vllm_fields(text) if (text := _text(inputs, VLLM_PARAMETERS)) else {}
    params = {
        **(proposed or {}),
        "num_log_probs": _num_log_probs(inputs),
        **_among(vllm, SamplingParams),
        **_read(inputs, PARAMS),
    }
    return RequestOptions(
        params=SamplingParams(**params),
        prompt_info=None if info is None else PromptInfo.from_json(info),
        **{**_among(vllm, RequestOptions), **_read(inputs, OPTIONS)},
    )


def _among(values: dict[str, Any], kind: type[SamplingParams | RequestOptions]) -> dict[str, Any]:
    """Those of `values` that are fields of `kind`."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


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
    if value is None:
        return None
    check_size(value, spec.name, MAX_TEXT_BYTES.get(spec.name, MAX_NAME_BYTES))
    return utf8_text(value, spec.name)


def _texts(inputs: dict[str, NDArray[Any]], spec: TensorSpec) -> tuple[str, ...] | None:
    """All values of a text tensor. NVIDIA's clients send one empty text for none."""
    if spec.name not in inputs:
        return None
    values = inputs[spec.name].reshape(-1)
    if len(values) > MAX_WORDS:
        raise RequestError(f"{spec.name} holds {len(values)} texts, must hold at most {MAX_WORDS}")
    check_size(values, spec.name, MAX_WORD_BYTES)
    texts = tuple(utf8_text(value, spec.name) for value in values)
    if len(texts) > 1 and "" in texts:
        raise RequestError(f"{spec.name} holds an empty text; leave it out")
    return () if texts == ("",) else texts
