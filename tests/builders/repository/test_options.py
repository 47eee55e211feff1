"""Request tensors and the engine options that they set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.admission import RequestOptions
from deepseek_triton.ensemble.models.options import read_options
from deepseek_triton.ensemble.models.tensors import array
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec
from deepseek_triton.ensemble.protocol.progress import PromptInfo
from deepseek_triton.ensemble.sampling import SamplingParams


def tensors(values: dict[TensorSpec, Any]) -> dict[str, NDArray[Any]]:
    return {spec.name: array(spec, value if isinstance(value, list) else [value]) for spec, value in values.items()}


def read(values: dict[TensorSpec, Any]) -> RequestOptions:
    return read_options(tensors(values))


# Tensor → a value, and where it must arrive. The numbers are exact in FP32.
READERS: dict[TensorSpec, tuple[Any, Callable[[RequestOptions], Any], Any]] = {
    contract.OPTIONS["max_tokens"]: (7, lambda o: o.params.max_tokens, 7),
    contract.OPTIONS["min_tokens"]: (3, lambda o: o.params.min_tokens, 3),
    contract.OPTIONS["temperature"]: (0.5, lambda o: o.params.temperature, 0.5),
    contract.OPTIONS["top_k"]: (9, lambda o: o.params.top_k, 9),
    contract.OPTIONS["top_p"]: (0.75, lambda o: o.params.top_p, 0.75),
    contract.OPTIONS["min_p"]: (0.25, lambda o: o.params.min_p, 0.25),
    contract.OPTIONS["seed"]: (2**64 - 1, lambda o: o.params.seed, 2**64 - 1),
    contract.OPTIONS["repetition_penalty"]: (1.5, lambda o: o.params.repetition_penalty, 1.5),
    contract.OPTIONS["presence_penalty"]: (-1.5, lambda o: o.params.presence_penalty, -1.5),
    contract.OPTIONS["frequency_penalty"]: (0.5, lambda o: o.params.frequency_penalty, 0.5),
    contract.OPTIONS["stop_words"]: ([b"a", "é".encode()], lambda o: o.stop_words, ("a", "é")),
    contract.OPTIONS["bad_words"]: ([b"b"], lambda o: o.bad_words, ("b",)),
    contract.OPTIONS["end_id"]: (-1, lambda o: o.params.end_id, -1),
    contract.OPTIONS["num_return_sequences"]: (4, lambda o: o.params.num_return_sequences, 4),
    contract.OPTIONS["guided_decoding_guide_type"]: (b"regex", lambda o: o.guide_type, "regex"),
    contract.OPTIONS["guided_decoding_guide"]: ("[é]+".encode(), lambda o: o.guide, "[é]+"),
    contract.OPTIONS["thinking_token_budget"]: (0, lambda o: o.thinking_token_budget, 0),
    contract.STREAM: (True, lambda o: o.stream, True),
    contract.OPTIONS["exclude_input_in_output"]: (False, lambda o: o.exclude_input_in_output, False),
    contract.OPTIONS["return_log_probs"]: (True, lambda o: o.params.num_log_probs, 0),
    contract.OPTIONS["num_top_log_probs"]: (5, lambda o: o.params.num_log_probs, 5),
    contract.OPTIONS["return_num_input_tokens"]: (False, lambda o: o.return_num_input_tokens, False),
    contract.OPTIONS["return_num_output_tokens"]: (False, lambda o: o.return_num_output_tokens, False),
    contract.OPTIONS["return_perf_metrics"]: (True, lambda o: o.return_perf_metrics, True),
    contract.OPTIONS["priority"]: (2, lambda o: o.priority, 2),
    contract.OPTIONS["queue_timeout_ms"]: (100, lambda o: o.queue_timeout_ms, 100),
    contract.OPTIONS["timeout_ms"]: (200, lambda o: o.timeout_ms, 200),
}
NOT_READ = {contract.OPTIONS["pad_id"]}
# What a tensor can't do without.
COMPANIONS: dict[TensorSpec, dict[TensorSpec, Any]] = {
    contract.OPTIONS["num_return_sequences"]: {contract.OPTIONS["temperature"]: 1.0},
    contract.OPTIONS["guided_decoding_guide"]: {contract.OPTIONS["guided_decoding_guide_type"]: b"json_schema"},
}


@pytest.mark.parametrize("spec", contract.ANSWER_INPUTS, ids=lambda spec: spec.name)
def test_every_tensor_of_the_contract_arrives(spec: TensorSpec) -> None:
    if spec in NOT_READ:
        assert read({spec: 3}) == read({})
        return
    value, arrives, expected = READERS[spec]  # a new tensor needs a reader, and a line above
    companions = COMPANIONS.get(spec, {})
    assert arrives(read({**companions, spec: value})) == expected
    assert arrives(read(companions)) != expected, "a default that is the value shows nothing"


def test_nothing_else_is_read() -> None:
    assert set(READERS) | NOT_READ == set(contract.ANSWER_INPUTS)


def test_without_any_tensor_everything_is_the_default() -> None:
    assert read({}) == RequestOptions(SamplingParams())


def test_what_the_tokenizer_says_of_the_prompt_arrives() -> None:
    info = PromptInfo(True, True)
    assert read({contract.PROMPT_INFO: info.to_json().encode()}).prompt_info == info
    with pytest.raises(ValueError, match="prompt_info is"):
        read({contract.PROMPT_INFO: b"5"})


SCALARS = [spec for spec in READERS if spec.dims == (1,)]


@pytest.mark.parametrize("spec", SCALARS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("count", [0, 2])
def test_a_tensor_of_another_length_is_refused_by_name(spec: TensorSpec, count: int) -> None:
    with pytest.raises(ValueError) as caught:
        read({**COMPANIONS.get(spec, {}), spec: [READERS[spec][0]] * count})
    assert str(caught.value) == f"{spec.name} holds {count} values, must hold one"


@pytest.mark.parametrize(
    "spec", [spec for spec in (*READERS, contract.PROMPT_INFO) if spec.dtype == "STRING"], ids=lambda spec: spec.name
)
def test_bytes_that_are_no_text_are_refused_by_name(spec: TensorSpec) -> None:
    with pytest.raises(ValueError) as caught:
        read({**COMPANIONS.get(spec, {}), spec: b"a\xff"})
    assert str(caught.value) == f"{spec.name} is not UTF-8 (byte 1): encode it as UTF-8"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({contract.OPTIONS["max_tokens"]: 0}, "max_tokens is 0, must be at least 1"),
        (
            {contract.OPTIONS["min_tokens"]: 5, contract.OPTIONS["max_tokens"]: 4},
            "min_tokens is 5, must be at most max_tokens, 4",
        ),
        ({contract.OPTIONS["temperature"]: np.nan}, "temperature is nan"),
        ({contract.OPTIONS["end_id"]: -2}, "end_id is -2, must be a token id, or -1 for none"),
        ({contract.OPTIONS["num_top_log_probs"]: -1}, "num_top_log_probs is -1, must be 0 to 20"),
        ({contract.OPTIONS["num_top_log_probs"]: 21}, "num_top_log_probs is 21, must be 0 to 20"),
        (
            {contract.OPTIONS["num_return_sequences"]: 2},
            "num_return_sequences is 2, but greedy sequences would all be equal",
        ),
        ({contract.OPTIONS["num_return_sequences"]: 0}, "num_return_sequences is 0, must be 1 to 64"),
        ({contract.OPTIONS["thinking_token_budget"]: -1}, "thinking_token_budget is -1, must be at least 0"),
        ({contract.OPTIONS["queue_timeout_ms"]: -1}, "queue_timeout_ms is -1, must be at least 0"),
        ({contract.OPTIONS["timeout_ms"]: -1}, "timeout_ms is -1, must be at least 0"),
        (
            {contract.OPTIONS["guided_decoding_guide"]: b"x"},
            "guided_decoding_guide is given without guided_decoding_guide_type; give both",
        ),
        ({contract.OPTIONS["stop_words"]: [b"a", b""]}, "stop_words holds an empty text; leave it out"),
        ({contract.OPTIONS["bad_words"]: [b"", b"a"]}, "bad_words holds an empty text; leave it out"),
    ],
)
def test_values_out_of_range_are_one_line(values: dict[TensorSpec, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(values)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", [contract.OPTIONS["stop_words"], contract.OPTIONS["bad_words"]], ids=lambda spec: spec.name
)
@pytest.mark.parametrize("none", [[], [b""]])
def test_an_empty_list_of_words_is_none(spec: TensorSpec, none: list[bytes]) -> None:
    assert read({spec: none}) == read({})


def test_empty_texts_for_a_guide_are_none() -> None:
    assert read(
        {contract.OPTIONS["guided_decoding_guide_type"]: b"", contract.OPTIONS["guided_decoding_guide"]: b""}
    ) == read({})


@pytest.mark.parametrize(
    ("num_top", "is_asked", "expected"),
    [(None, None, None), (None, False, None), (None, True, 0), (0, None, None), (0, False, None), (0, True, 0),
     (3, None, 3), (3, True, 3), (3, False, 3)],
)  # fmt: skip
def test_how_many_log_probs_are_wanted(num_top: int | None, is_asked: bool | None, expected: int | None) -> None:
    values = {contract.OPTIONS["num_top_log_probs"]: num_top, contract.OPTIONS["return_log_probs"]: is_asked}
    options = read({spec: value for spec, value in values.items() if value is not None})
    assert options.params.num_log_probs == expected


@pytest.mark.parametrize(("excludes", "echoes"), [(None, False), (True, False), (False, True)])
def test_the_prompt_comes_back_only_where_that_is_asked_for(excludes: bool | None, echoes: bool) -> None:
    values = {} if excludes is None else {contract.OPTIONS["exclude_input_in_output"]: excludes}
    assert read(values).exclude_input_in_output is not echoes
