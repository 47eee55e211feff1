"""Helpers for tests with a real server: raw requests, and the engine's metrics from /metrics."""

from __future__ import annotations

import math
import struct
import time
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME

TIMEOUT_S = 120.0
PUBLISH_S = 0.25  # ensemble/models/metrics.py


def metrics(server: TritonServer, model: str = NAME) -> dict[str, float]:
    """The engine's numbers: name without prefix → value; histograms' buckets left out."""
    text = httpx.get(server.metrics_url, timeout=TIMEOUT_S).text
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return {
        sample.name.removeprefix("deepseek_"): sample.value
        for sample in samples
        if sample.name.startswith("deepseek_") and sample.labels.get("model") == model and "le" not in sample.labels
    }


def wait_until(
    server: TritonServer, limit_s: float, *, model: str = NAME, slots_at_most: float = math.inf, **wanted: float
) -> float:
    """Wait until the engine's numbers are those wanted, and so few slots are used; returns how long that took, in s.

    Numbers of one publication are not all published at one time: those that belong together are waited for together.
    """
    start = time.monotonic()
    while True:
        found = metrics(server, model)
        if all(found[name] == value for name, value in wanted.items()) and found["slots_used"] <= slots_at_most:
            return time.monotonic() - start
        if (waited := time.monotonic() - start) > limit_s:
            shown = {name: found[name] for name in (*wanted, "slots_used")}
            raise AssertionError(f"wanted {wanted} within {limit_s} s, after {waited:.1f} s it is {shown}")
        time.sleep(0.02)


def infer_request(request_id: str = "", **values: Any) -> service_pb2.ModelInferRequest:
    """A request of the served model over gRPC: text, bool, int (INT32) and float (FP32) inputs."""
    request = service_pb2.ModelInferRequest(model_name=NAME, id=request_id)
    for name, value in values.items():
        if isinstance(value, str):
            datatype, raw = "BYTES", struct.pack("<I", len(value.encode())) + value.encode()
        elif isinstance(value, bool):
            datatype, raw = "BOOL", struct.pack("<?", value)
        elif isinstance(value, int):
            datatype, raw = "INT32", struct.pack("<i", value)
        else:
            datatype, raw = "FP32", struct.pack("<f", value)
        request.inputs.add(name=name, datatype=datatype, shape=(1, 1))
        request.raw_input_contents.append(raw)
    return request
