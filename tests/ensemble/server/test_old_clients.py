"""The port for old clients: what it changes in a request, and that all else passes it."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek_triton.ensemble.server.installation import ServerError
from deepseek_triton.ensemble.server.old_clients import OldClientPort, adapted
from tests.support.fake_triton import MODEL, Behaviour, fake_triton

LIMIT_S = 20.0


def message(**tensors: tuple[str, Any]) -> Any:
    request = service_pb2.ModelInferRequest(model_name="ensemble", id="7")
    for name, (datatype, values) in tensors.items():
        request.inputs.add(name=name, datatype=datatype, shape=values.shape)
        request.raw_input_contents.append(values.tobytes())
    return request


def through(request: Any) -> Any:
    return service_pb2.ModelInferRequest.FromString(adapted(request.SerializeToString()))


@pytest.mark.parametrize(
    ("name", "datatype", "given", "wanted", "dtype"),
    [
        ("max_tokens", "UINT32", np.uint32, "INT32", np.int32),
        ("max_tokens", "INT64", np.int64, "INT32", np.int32),
        ("beam_width", "UINT32", np.uint32, "INT32", np.int32),
        ("random_seed", "UINT32", np.uint32, "UINT64", np.uint64),
        ("temperature", "FP64", np.float64, "FP32", np.float32),
    ],
)
def test_numbers_get_the_declared_type(name: str, datatype: str, given: Any, wanted: str, dtype: Any) -> None:
    read = through(message(**{name: (datatype, np.array([[3]], given))}))
    assert read.inputs[0].datatype == wanted and read.id == "7"
    assert np.frombuffer(read.raw_input_contents[0], dtype).tolist() == [3]


@pytest.mark.parametrize(
    ("datatype", "values"),
    [("INT64", np.array([[2**40]])), ("UINT32", np.array([[2**31]], np.uint32)), ("FP32", np.array([[0.5]], "<f4"))],
)
def test_what_would_be_changed_stays_for_triton_to_refuse(datatype: str, values: Any) -> None:
    sent = message(max_tokens=(datatype, values))
    assert through(sent) == sent


def test_a_missing_batch_dimension_is_added() -> None:
    read = through(message(stream=("BOOL", np.array([True])), max_tokens=("INT32", np.array([[5]], np.int32))))
    assert [list(tensor.shape) for tensor in read.inputs] == [[1, 1], [1, 1]]


def test_the_tensors_of_other_models_pass_unchanged() -> None:
    sent = message(input_ids=("INT32", np.array([5], np.int32)), anything=("UINT32", np.array([5], np.uint32)))
    assert through(sent) == sent


@pytest.mark.slow
def test_calls_of_every_kind_pass() -> None:
    with (
        fake_triton(Behaviour(first_s=0.0, gap_s=0.0, num_tokens=3)) as ports,
        OldClientPort("127.0.0.1:0", f"127.0.0.1:{ports.grpc}") as port,
        grpc.insecure_channel(port.address) as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelReady(service_pb2.ModelReadyRequest(name=MODEL), timeout=LIMIT_S).ready
        request = message(stream=("BOOL", np.array([True])))
        request.model_name = MODEL
        responses = list(stub.ModelStreamInfer(iter([request]), timeout=LIMIT_S))
        assert [response.infer_response.outputs[0].name for response in responses] == ["text_output"] * 3
        with pytest.raises(grpc.RpcError) as caught:
            stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=LIMIT_S)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_server_that_is_gone_is_told_and_a_port_in_use_too() -> None:
    with OldClientPort("127.0.0.1:0", "127.0.0.1:1") as port:
        with grpc.insecure_channel(port.address) as channel, pytest.raises(grpc.RpcError) as caught:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            stub.ModelReady(service_pb2.ModelReadyRequest(name=MODEL), timeout=LIMIT_S)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    with pytest.raises(ServerError, match="can't be opened"):
        OldClientPort("256.0.0.1:5", "127.0.0.1:1")
