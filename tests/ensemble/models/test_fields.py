"""Fields of a request that no model reads."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_triton.ensemble.models.fields import check_fields
from deepseek_triton.ensemble.models.tensors import RequestError
from deepseek_triton.ensemble.protocol import contract
from tests.ensemble.models.test_adapters import Request


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_tokns": 3}, "unknown field 'max_tokns'; did you mean max_tokens?"),
        ({"temprature": 0.5}, "unknown field 'temprature'; did you mean temperature?"),
        ({"prompt": "x"}, "unknown field 'prompt'; did you mean text_input?"),
        ({"stop": "x"}, "unknown field 'stop'; did you mean stop_words?"),
        ({"id": "1", "xyzzy": True}, "unknown field 'xyzzy'"),
        ({"max_tokens": 3}, "max_tokens is a parameter of the request, must be an input"),
    ],
)
def test_what_nobody_reads_is_refused_with_the_nearest_name(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_fields(Request(**parameters), contract.ENSEMBLE.inputs)
    assert str(caught.value) == message


def test_tritons_own_parameters_and_headers_pass() -> None:
    check_fields(Request(), contract.ENSEMBLE.inputs)
    check_fields(Request(stop_key="secret"), contract.ENSEMBLE.inputs)
    headers: dict[str, Any] = {"user-agent": "grpc-python", "traceparent": "00-1", "x-request-id": "7"}
    check_fields(Request(**headers), contract.ENSEMBLE.inputs)
    check_fields(
        Request(id="1", timeout=5, binary_data_output=True, triton_enable_empty_final_response=True),
        contract.ENSEMBLE.inputs,
    )


def test_a_scoring_model_proposes_its_own_inputs() -> None:
    with pytest.raises(RequestError, match=r"unknown field 'label'; did you mean labels\?"):
        check_fields(Request(label="x"), contract.SCORE.inputs)
    with pytest.raises(RequestError, match=r"unknown field 'max_tokens'$"):
        check_fields(Request(max_tokens=1), contract.SCORE.inputs)
