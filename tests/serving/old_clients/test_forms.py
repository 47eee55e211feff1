"""The forms in which other ensembles' clients ask, through the real server: what each sends, and what it reads.

The messages here have the form of those clients' own. The clients themselves run in test_real_clients.py.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.connect import ProtocolName, connect
from deepseek_triton.ensemble.server.old_clients import OldClientPort
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME
from tests.support.serving import TIMEOUT_S, metrics, wait_until

pytestmark = pytest.mark.server

CAPITAL, SUM = "The capital of France is", "Two plus two is"
DTYPES = {
    "bool": "BOOL",
    "int32": "INT32",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "float32": "FP32",
    "object": "BYTES",
}


def array(value: Any) -> NDArray[Any]:
    """[[value]] as an old client sends it; arrays pass."""
    if isinstance(value, np.ndarray):
        return value
    kind: Any = {bool: np.bool_, int: np.int32, float: np.float32, str: np.object_}[type(value)]
    return np.array([[value]], kind)


def inputs(module: Any, **values: Any) -> list[Any]:
    tensors = []
    for name, value in values.items():
        data = array(value)
        tensor = module.InferInput(name, list(data.shape), DTYPES[data.dtype.name])
        tensor.set_data_from_numpy(data)
        tensors.append(tensor)
    return tensors


def stream(url: str, **values: Any) -> list[dict[str, NDArray[Any]]]:
    """The responses' outputs, as tritonclient's stream call gives them."""
    received: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    answers = []
    with tritonclient.grpc.InferenceServerClient(url) as client:
        client.start_stream(callback=lambda result, error: received.put((result, error)))
        client.async_stream_infer(NAME, inputs(tritonclient.grpc, **values), enable_empty_final_response=True)
        while True:
            result, error = received.get(timeout=TIMEOUT_S)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                answers.append({output.name: result.as_numpy(output.name) for output in response.outputs})
            if response.parameters["triton_final_response"].bool_param:
                return answers


def generate(server: TritonServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.http_url}/v2/models/{NAME}/generate", json=fields, timeout=TIMEOUT_S)


E2E = {"text_input": CAPITAL, "max_tokens": 6, "beam_width": 1, "temperature": 1.0}  # end_to_end_grpc_client.py's


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_the_end_to_end_client_reads(server: TritonServer, is_streamed: bool) -> None:
    answers = stream(server.grpc_url, **E2E, stream=is_streamed, exclude_input_in_output=False, return_log_probs=True)
    text = "".join(answer["text_output"][0].decode() for answer in answers)
    assert " Paris" in text and text.startswith(CAPITAL) == (not is_streamed)
    assert text.endswith(generate(server, text_input=CAPITAL, max_tokens=6).json()["text_output"]), (
        "greedy, as NVIDIA's"
    )
    for answer in answers:
        assert answer["batch_index"][0][0] == 0
        assert answer["output_log_probs"].ndim == 3 and answer["cum_log_probs"].shape == (1, 1)
    assert sum(answer["output_log_probs"].size for answer in answers) == 6


@pytest.mark.parametrize("is_streamed", [False, True])
def test_each_sequence_has_a_response_of_its_own(tiny_server: TritonServer, is_streamed: bool) -> None:
    answers = stream(tiny_server.grpc_url, **E2E, stream=is_streamed, num_return_sequences=2)
    assert all(len(answer["text_output"]) == 1 for answer in answers)
    assert {int(answer["sequence_index"][0][0]) for answer in answers} == {0, 1}
    assert is_streamed or len(answers) == 2


def test_http_takes_all_sequences_in_one_response(tiny_server: TritonServer) -> None:
    answer = generate(tiny_server, text_input=CAPITAL, max_tokens=4, temperature=1.0, num_return_sequences=2)
    assert answer.status_code == 200 and len(answer.json()["text_output"]) == 2


@pytest.mark.parametrize("is_streamed", [False, True])
def test_several_prompts_in_one_request(tiny_server: TritonServer, is_streamed: bool) -> None:
    both = np.array([[CAPITAL], [SUM]], np.object_)
    sent = {"max_tokens": np.array([[6], [3]], np.int32), "stream": np.array([[is_streamed]] * 2)}
    texts, counts = ["", ""], [0, 0]
    for answer in stream(tiny_server.grpc_url, text_input=both, **sent):
        index = int(answer["batch_index"][0][0])
        texts[index] += answer["text_output"][0].decode()
        counts[index] += int(answer["num_output_tokens"][0][0])
    alone = [generate(tiny_server, text_input=prompt, max_tokens=n).json() for prompt, n in ((CAPITAL, 6), (SUM, 3))]
    assert texts == [answer["text_output"] for answer in alone] and counts == [6, 3]
    with pytest.raises(Exception, match="max_tokens is 0"):
        stream(tiny_server.grpc_url, text_input=both, max_tokens=np.array([[6], [0]], np.int32))


def test_token_counts_that_were_asked_for_add_up(server: TritonServer) -> None:
    frontend = {"text_input": CAPITAL, "max_tokens": 6, "stream": True}  # Triton's OpenAI frontend's
    added = stream(server.grpc_url, **frontend, return_num_input_tokens=True, return_num_output_tokens=True)
    assert [int(answer["num_output_tokens"].item()) for answer in added] == [1] * 6
    unasked = stream(server.grpc_url, **frontend)
    assert sum(int(answer["num_output_tokens"].sum()) for answer in unasked) == 6


def test_token_counts_of_several_sequences_and_prompts_add_up(tiny_server: TritonServer) -> None:
    both = np.array([[CAPITAL], [SUM]], np.object_)
    sent: dict[str, Any] = {"stream": True, "max_tokens": 5, "end_id": -1}
    sequences = stream(tiny_server.grpc_url, text_input=CAPITAL, num_return_sequences=2, temperature=1.0, **sent)
    prompts = stream(tiny_server.grpc_url, text_input=both, **{k: np.repeat(array(v), 2, 0) for k, v in sent.items()})
    for answers in (sequences, prompts):
        assert sum(int(answer["num_output_tokens"].sum()) for answer in answers) == 10


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_our_own_clients_read_the_count_so_far(tiny_server: TritonServer, protocol: ProtocolName) -> None:
    url = tiny_server.http_url if protocol == "http" else tiny_server.grpc_url
    with connect(protocol, NAME, url) as client:
        chunks = list(client.stream(GenerateRequest(prompt=CAPITAL, max_tokens=6)))
    assert chunks[-1].num_output_tokens == 6 and len(chunks) > 1


REFUSED = {"beam_width": 2, "length_penalty": 0.5, "return_context_logits": True, "lora_task_id": 1}


@pytest.mark.parametrize("name", REFUSED)
def test_what_isnt_here_is_refused_by_name_over_both_protocols(tiny_server: TritonServer, name: str) -> None:
    answer = generate(tiny_server, text_input=CAPITAL, max_tokens=2, **{name: REFUSED[name]})
    assert answer.status_code == 400 and f"{name} is " in answer.json()["error"]
    value: Any = np.array([[1]], np.uint64) if name == "lora_task_id" else REFUSED[name]
    with pytest.raises(Exception, match=name):
        stream(tiny_server.grpc_url, text_input=CAPITAL, max_tokens=2, **{name: value})


@pytest.mark.parametrize("name", ["prompt_embedding_table", "lora_weights", "lora_config"])
def test_tensors_in_several_dimensions_are_refused_by_name(tiny_server: TritonServer, name: str) -> None:
    table = np.zeros([1, 2, 3], np.float32)
    with pytest.raises(InferenceServerException, match=name):
        stream(tiny_server.grpc_url, **E2E, **{name: table})
    response = generate(tiny_server, **E2E, **{name: table.tolist()})
    assert response.status_code == 400 and name in response.text


def test_an_output_of_speculative_decoding_is_refused_by_name(tiny_server: TritonServer) -> None:
    """What v0.19.0's client asks for with --return-perf-metrics."""
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(tiny_server.grpc_url) as client:
        client.start_stream(callback=lambda result, error: received.put(error))
        wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in ("text_output", "acceptance_rate")]
        client.async_stream_infer(NAME, inputs(tritonclient.grpc, **E2E), outputs=wanted)
        assert "acceptance_rate" in str(received.get(timeout=TIMEOUT_S))


def test_older_names_and_nvidias_zeros_over_http(server: TritonServer) -> None:
    asked = {"text_input": CAPITAL, "max_tokens": 10, "temperature": 1.0, "top_k": 50, "random_seed": 7}
    texts = {generate(server, **asked, repetition_penalty=0, length_penalty=1).json()["text_output"] for _ in range(2)}
    assert len(texts) == 1
    plain = generate(server, text_input=CAPITAL, max_tokens=4).json()["text_output"]
    assert generate(server, text_input=CAPITAL, max_tokens=4, top_p=0, temperature=1.0).json()["text_output"] == plain
    assert (
        generate(server, text_input="2+2=4. The end.", max_tokens=40, min_length=40).json()["num_output_tokens"] == 40
    )


def test_vllms_sampling_parameters_over_http(tiny_server: TritonServer) -> None:
    parameters = json.dumps({"temperature": "0", "max_tokens": 4})
    answer = generate(tiny_server, text_input=CAPITAL, sampling_parameters=parameters).json()
    assert answer["text_output"] == generate(tiny_server, text_input=CAPITAL, max_tokens=4).json()["text_output"]
    refused = generate(tiny_server, text_input=CAPITAL, sampling_parameters='{"use_beam_search": true}')
    assert refused.status_code == 400 and "use_beam_search" in refused.json()["error"]


@pytest.fixture
def old_port(tiny_server: TritonServer) -> Iterator[str]:
    with OldClientPort(f"{tiny_server.host}:0", tiny_server.grpc_url) as port:
        yield port.address


def test_uint32_and_a_missing_batch_dimension_through_the_port_for_old_clients(
    tiny_server: TritonServer, old_port: str
) -> None:
    expected = generate(tiny_server, text_input=CAPITAL, max_tokens=4).json()["text_output"].encode()
    langchains: dict[str, Any] = {"text_input": CAPITAL, "max_tokens": np.array([[4]], np.uint32)}
    assert stream(old_port, **langchains, beam_width=np.array([[1]], np.uint32))[0]["text_output"].tolist() == [
        expected
    ]
    vllms = {"text_input": np.array([CAPITAL], np.object_), "stream": np.array([False])}
    vllms["sampling_parameters"] = np.array(['{"max_tokens": 4, "temperature": 0}'], np.object_)
    assert stream(old_port, **vllms)[0]["text_output"].tolist() == [expected]
    with pytest.raises(Exception, match="UINT32"):
        stream(tiny_server.grpc_url, **langchains)


@pytest.mark.parametrize("module", [tritonclient.grpc, tritonclient.http], ids=["grpc", "http"])
def test_infer_gives_one_response(server: TritonServer, module: Any) -> None:
    url = server.grpc_url if module is tritonclient.grpc else server.http_url.removeprefix("http://")
    with module.InferenceServerClient(url) as client:
        one = client.infer(f"{NAME}-infer", inputs(module, text_input=CAPITAL, max_tokens=4))
        assert one.as_numpy("num_output_tokens").tolist() == [[4]] and one.as_numpy("text_output").shape == (1,)
        both = np.array([[SUM], [CAPITAL]], np.object_)
        sent = inputs(module, text_input=both, max_tokens=np.array([[2], [4]], np.int32))
        several = client.infer(f"{NAME}-infer", sent)
        assert several.as_numpy("text_output")[1] == one.as_numpy("text_output")[0]
        assert several.as_numpy("batch_index").tolist() == [[0], [1]]


ERRORS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "beam_width is 2": ({"text_input": CAPITAL, "beam_width": 2}, {}, "400", "INVALID_ARGUMENT"),
    "max_tokens is 0": ({"text_input": CAPITAL, "max_tokens": 0}, {}, "400", "INVALID_ARGUMENT"),
    "context holds": ({"text_input": CAPITAL * 200}, {}, "400", "INVALID_ARGUMENT"),
    "give either": ({"max_tokens": 1}, {}, "400", "INVALID_ARGUMENT"),
    "did you mean temperature": ({"text_input": CAPITAL}, {"temprature": "1"}, "400", "INVALID_ARGUMENT"),
    "timed out": ({"text_input": CAPITAL, "max_tokens": 400, "end_id": -1, "timeout_ms": 50}, {}, "503", "UNAVAILABLE"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_of_infer_keep_their_kind(server: TritonServer, message: str) -> None:
    values, parameters, http, grpc = ERRORS[message]
    for module, url, status in (
        (tritonclient.http, server.http_url.removeprefix("http://"), http),
        (tritonclient.grpc, server.grpc_url, f"StatusCode.{grpc}"),
    ):
        with module.InferenceServerClient(url) as client, pytest.raises(Exception, match=message) as caught:
            client.infer(f"{NAME}-infer", inputs(module, **values), parameters=parameters or None)
        assert caught.value.status() == status  # type: ignore[attr-defined]


@pytest.mark.timed
def test_infer_of_a_client_that_has_gone_is_stopped(server: TritonServer) -> None:
    cancelled = metrics(server)["requests_cancelled_total"]
    sent = inputs(tritonclient.grpc, text_input="Once", max_tokens=400, end_id=-1)
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client, pytest.raises(Exception, match="Deadline"):
        client.infer(f"{NAME}-infer", sent, client_timeout=0.5)
    wait_until(server, 5.0, requests_cancelled_total=cancelled + 1, slots_used=0)


def test_nvidias_metric_names(server: TritonServer) -> None:
    text = httpx.get(server.metrics_url, timeout=TIMEOUT_S).text
    for series in (
        'nv_trt_llm_request_metrics{model="smollm2",request_type="max"',
        "nv_trt_llm_kv_cache_block_metrics{",
    ):
        assert series in text
