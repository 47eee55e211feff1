"""Requests gone wrong by the thousand, through every way into the real server.

Each is answered in time, nothing is left behind, and a stream beside them comes out as it does alone.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME
from tests.support.fuzz import Fuzzer
from tests.support.serving import TIMEOUT_S, metrics, wait_until

# Enough to notice what broke since ten thousand were last sent:
# FUZZ_REQUESTS=10000 pytest -o timeout=0 -o faulthandler_timeout=0 tests/serving/test_fuzz.py
NUM_REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "1200"))
NUM_CLIENTS = 8
ANSWER_LIMIT_S = 120.0  # for a mutation may take away what keeps an answer short


class Crowd:
    """Sends requests and counts how they end."""

    def __init__(self, server: TritonServer) -> None:
        self._server = server
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def send(self, number: int) -> None:
        fuzzer = Fuzzer(NAME, seed=number)
        limits = httpx.Limits(max_keepalive_connections=1)
        with (
            httpx.Client(base_url=self._server.http_url, timeout=ANSWER_LIMIT_S, limits=limits) as client,
            grpc.insecure_channel(self._server.grpc_url, options=[("grpc.use_local_subchannel_pool", 1)]) as channel,
        ):
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for _ in range(NUM_REQUESTS // NUM_CLIENTS):
                request = fuzzer.request()
                if isinstance(request.payload, bytes):
                    outcome = self._over_http(client, request.way, request.payload)
                else:
                    outcome = self._over_grpc(stub, request.payload)
                with self._lock:
                    self.outcomes[f"{request.way}: {outcome}"] += 1

    @staticmethod
    def _over_http(client: httpx.Client, way: str, body: bytes) -> str:
        try:
            response = client.post(f"/v2/models/{NAME}/{way}", content=body)
        except httpx.TransportError as error:
            raise AssertionError(f"{way} of {body[:2000]!r}: {error!r}") from error
        text = response.text
        assert "Traceback" not in text, text
        is_answer = response.status_code == 200 and '"error"' not in text
        assert is_answer or "error" in text, (response.status_code, text, body)
        return "answer" if is_answer else "error"

    @staticmethod
    def _over_grpc(stub: service_pb2_grpc.GRPCInferenceServiceStub, message: service_pb2.ModelInferRequest) -> str:
        outcome = "nothing"
        try:
            for response in stub.ModelStreamInfer(iter([message]), timeout=ANSWER_LIMIT_S):
                outcome = "error" if response.error_message else "answer"
        except grpc.RpcError as error:
            assert error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE), message
            outcome = "error"
        return outcome


@pytest.mark.server
def test_nothing_that_is_sent_takes_the_server_or_a_stream_down(tiny_server: TritonServer) -> None:
    server = tiny_server
    beside = GenerateRequest(prompt="A long story about a river:", max_tokens=400)
    with GrpcClient(server.grpc_url, NAME, TIMEOUT_S) as client:
        expected = "".join(chunk.text for chunk in client.stream(beside))
        before = metrics(server)
        crowd = Crowd(server)
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            senders = [pool.submit(crowd.send, number) for number in range(NUM_CLIENTS)]
            texts = []
            while not all(sender.done() for sender in senders):
                texts.append("".join(chunk.text for chunk in client.stream(beside)))
            for sender in senders:
                sender.result()
        assert set(texts) == {expected}
        wait_until(server, 5, slots_used=0, sequences_waiting=0)
        assert "".join(chunk.text for chunk in client.stream(beside)) == expected
    after = metrics(server)
    print(dict(sorted(crowd.outcomes.items())), {name: after[name] - before[name] for name in after})
    assert sum(crowd.outcomes.values()) == NUM_REQUESTS
    assert not [outcome for outcome in crowd.outcomes if outcome.endswith("nothing")]
    answered = sum(count for outcome, count in crowd.outcomes.items() if outcome.endswith("answer"))
    assert NUM_REQUESTS / 20 < answered < NUM_REQUESTS / 2, "the mutations are too wild, or too tame, to test much"
    assert server.exit_status is None
