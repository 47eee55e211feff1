"""What other ensembles' clients send → this project's options: aliases, values that change nothing, refusals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from deepseek_triton.ensemble.engine.admission import RequestOptions
from deepseek_triton.ensemble.models.options import own_names, read_options
from deepseek_triton.ensemble.models.tensors import NUMPY_DTYPES, array, padded, rows, without_padding
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.compatible_options import COMPATIBLE_BY_NAME, COMPATIBLE_OPTIONS
from deepseek_triton.ensemble.protocol.contract import TensorSpec
from deepseek_triton.ensemble.protocol.progress import PromptInfo
from deepseek_triton.ensemble.sampling import SamplingParams

SPECS: dict[str, TensorSpec] = {spec.name: spec for spec in contract.ENGINE.inputs}
THROUGH_THE_ENSEMBLE = PromptInfo().to_json().encode()
OTHER_VALUES: dict[str, Any] = {"BOOL": True, "INT32": 2, "UINT64": 3, "FP32": 0.5, "STRING": b"a"}


def read(**values: Any) -> RequestOptions:
    given = {"prompt_info": THROUGH_THE_ENSEMBLE, **values}
    tensors = {name: array(SPECS[name], value if isinstance(value, list) else [value]) for name, value in given.items()}
    return read_options(own_names(tensors))


def params(**values: Any) -> SamplingParams:
    return read(**values).params


def test_no_input_has_two_rows_and_each_is_one_of_the_ensembles() -> None:
    own = {spec.name for spec in contract.GENERATE.inputs}
    assert len(COMPATIBLE_BY_NAME) == len(COMPATIBLE_OPTIONS) and own.isdisjoint(COMPATIBLE_BY_NAME)
    assert {spec.name for spec in contract.ENSEMBLE.inputs} == own | set(COMPATIBLE_BY_NAME)
    for option in COMPATIBLE_OPTIONS:
        assert option.meaning.endswith(".") and option.tensor.optional
        assert option.alias_of in ("", "sampling_parameters") or SPECS[option.alias_of].dtype == option.dtype


def test_an_older_name_is_the_option() -> None:
    assert params(random_seed=7).seed == 7 and params(min_length=3).min_tokens == 3


@pytest.mark.parametrize(("name", "older"), [("seed", "random_seed"), ("min_tokens", "min_length")])
def test_both_names_at_once_are_refused(name: str, older: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is given and {older}, its older name; give one of them$"):
        read(**{name: 1, older: 1})


NEUTRALS = [(option.tensor_name, value) for option in COMPATIBLE_OPTIONS for value in option.neutral]
NEUTRALS += [(option.tensor_name, b"") for option in COMPATIBLE_OPTIONS if option.dtype == "STRING"]
REFUSING = [option for option in COMPATIBLE_OPTIONS if not option.alias_of and set(option.neutral) != {True, False}]


@pytest.mark.parametrize(("name", "value"), NEUTRALS)
def test_a_value_that_changes_nothing_is_taken(name: str, value: Any) -> None:
    assert read(**{name: value}).params in (SamplingParams(), SamplingParams(temperature=0.0))


@pytest.mark.parametrize("option", REFUSING, ids=lambda option: option.tensor_name)
def test_any_other_value_is_refused_by_name(option: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option.tensor_name} is .*(must be|left out).*: {option.meaning[:9]}"):
        read(**{option.tensor_name: OTHER_VALUES[option.dtype]})


def test_a_list_without_values_is_taken() -> None:
    assert read(embedding_bias_words=[], embedding_bias_weights=[]).params == SamplingParams()


def test_nvidias_zeros_mean_not_set() -> None:
    assert params(repetition_penalty=0.0).repetition_penalty == 1.0
    assert params(top_p=0.0, top_k=5, temperature=0.5) == SamplingParams(top_k=5, temperature=0.5)
    assert params(top_p=0.0, temperature=0.5).is_greedy, "without top_k, NVIDIA's engine takes the likeliest"
    for wrong in ({"top_p": -0.5}, {"repetition_penalty": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is -"):
            read(**wrong)


def test_a_direct_call_of_the_engine_has_no_such_zeros() -> None:
    with pytest.raises(ValueError, match=r"top_p is 0\.0"):
        read_options(own_names({"top_p": array(SPECS["top_p"], [0.0])}))


def test_nvidias_client_samples_only_with_top_k_top_p_or_several_answers() -> None:
    assert params(beam_width=1, temperature=1.0).is_greedy
    for more in ({"top_k": 5}, {"top_p": 0.5}, {"num_return_sequences": 2}):
        assert not params(beam_width=1, temperature=1.0, **more).is_greedy
    assert not params(temperature=1.0).is_greedy


def test_nvidias_stream_never_begins_with_the_prompt() -> None:
    assert not read(beam_width=1, exclude_input_in_output=False).exclude_input_in_output
    assert read(beam_width=1, exclude_input_in_output=False, stream=True).exclude_input_in_output
    assert not read(exclude_input_in_output=False, stream=True).exclude_input_in_output


def vllm(**values: Any) -> RequestOptions:
    return read(sampling_parameters=json.dumps(values).encode())


def test_vllms_parameters_with_vllms_defaults() -> None:
    assert vllm().params == SamplingParams(temperature=1.0, max_tokens=16)
    given = vllm(
        n=2, temperature="0.5", top_p=0.75, top_k=-1, min_p=0.25, seed=3, presence_penalty=0.5, frequency_penalty=-0.5,
        repetition_penalty=1.5, max_tokens="100", min_tokens=1, logprobs=2, ignore_eos=True, stop="a", bad_words=["b"],
    )  # fmt: skip
    assert given.params == SamplingParams(
        num_return_sequences=2, temperature=0.5, top_p=0.75, top_k=0, min_p=0.25, seed=3, presence_penalty=0.5,
        frequency_penalty=-0.5, repetition_penalty=1.5, max_tokens=100, min_tokens=1, num_log_probs=2, end_id=-1,
    )  # fmt: skip
    assert (given.stop_words, given.bad_words) == (("a",), ("b",))
    assert vllm(max_tokens=None).params.max_tokens is None


def test_a_tensor_counts_more_than_vllms_parameter() -> None:
    assert read(sampling_parameters=b'{"max_tokens": 3}', max_tokens=5).params.max_tokens == 5


@pytest.mark.parametrize("key", ["guided_decoding", "structured_outputs"])
def test_vllms_guides(key: str) -> None:
    schema = {"type": "object"}
    for value in ({"json": schema, "regex": None}, json.dumps({"json": json.dumps(schema), "choice": None})):
        given = vllm(**{key: value})
        assert given.guide_type == "json_schema" and json.loads(given.guide or "") == schema
    assert vllm(**{key: {"choice": ["a", "b"]}}).guide == '["a", "b"]'
    assert vllm(**{key: {"json_object": True}}).guide_type == "json"
    assert vllm(**{key: {"regex": None}}).guide_type is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object"),
        ("{", "must be a JSON object"),
        ("[" * 100_000, "must be a JSON object"),
        ('{"temprature": 0}', "has the unknown key 'temprature'"),
        ('{"max_tokens": 1.5}', "max_tokens = 1.5, must be an integer"),
        ('{"max_tokens": true}', "max_tokens = true, must be an integer"),
        ('{"temperature": "hot"}', 'temperature = "hot", must be a number'),
        ('{"temperature": [1]}', r"temperature = \[1\], must be a number"),
        ('{"stop": [1]}', r"stop = \[1\], must be a text or a list of texts"),
        ('{"ignore_eos": 3}', "ignore_eos = 3, must be true or false"),
        ('{"use_beam_search": true}', "use_beam_search = true, which isn't here"),
        ('{"best_of": 2}', "best_of = 2, which isn't here"),
        ('{"detokenize": false}', "detokenize = false, which isn't here"),
        ('{"logit_bias": {"5": 1}}', "logit_bias = "),
        ('{"guided_decoding": {"json": "{}", "regex": "a"}}', "must have one of"),
        ('{"guided_decoding": {"structural_tag": "x"}}', "must have one of"),
        ('{"guided_decoding": 5}', "must be an object"),
        ('{"top_p": 2}', "top_p is 2.0"),
    ],
)
def test_vllms_parameters_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(sampling_parameters=text.encode())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_vllms_neutral_values_are_taken() -> None:
    neutral: dict[str, Any] = {
        "stop_token_ids": [], "logit_bias": {}, "prompt_logprobs": None, "skip_special_tokens": True,
        "use_beam_search": False, "include_stop_str_in_output": False, "best_of": 1, "length_penalty": 1.0,
        "stop": None,
    }  # fmt: skip
    assert vllm(**neutral) == vllm()


def test_the_rows_of_a_request_are_its_prompts() -> None:
    inputs = {"a": np.array([[1], [2]], np.int32), "b": np.array([[b"x", b"y"], [b"z", b""]], NUMPY_DTYPES["STRING"])}
    first, second = rows(inputs)
    assert (first.index, second.index) == (0, 1) and first.is_one_of_several and second.is_one_of_several
    assert first.inputs["a"].tolist() == [[1]] and second.inputs["b"].tolist() == [[b"z", b""]]
    assert [row.is_one_of_several for row in rows({})] == [False]


def test_prompts_of_different_lengths_share_an_array() -> None:
    prompts = [[5, 6, 7], [8], []]
    ids = padded(prompts)
    assert ids.shape == (3, 3) and ids.dtype == np.int32
    assert [without_padding(row).tolist() for row in ids] == prompts
