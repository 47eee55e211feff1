"""The clients themselves, unmodified, from PyPI, each in a virtual environment of its own.

pip fills the environments once. A client that can't be had is skipped with pip's reason.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_triton.clients.api import GenerateRequest
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.server.old_clients import OldClientPort
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME, serve
from tests.support.environments import kept_environment

pytestmark = [pytest.mark.server, pytest.mark.slow]

RUN_LIMIT_S = 120.0
PROMPT = "The capital of France is"

LANGCHAIN = """
import sys
from langchain_nvidia_trt.llms import TritonTensorRTLLM
model = TritonTensorRTLLM(server_url=sys.argv[1], model_name=sys.argv[2], tokens=6)
print(repr(model.invoke(sys.argv[3])))
print(repr("".join(model.stream(sys.argv[3]))))
"""
LLAMA_INDEX = """
import sys
from llama_index.llms.nvidia_triton import NvidiaTriton
model = NvidiaTriton(server_url=sys.argv[1], model_name=sys.argv[2], tokens=7)  # its client drops the last token
print(repr(model.complete(sys.argv[3]).text))
print(repr("".join(part.delta for part in model.stream_complete(sys.argv[3]))))
"""


@pytest.fixture
def own_server(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Triton 2.51 dies of what LangChain's client mixes on one stream, now and then (SECURITY.md)."""
    yield from serve(tiny_repository, tmp_path_factory.mktemp("log"))


def test_langchain_answers_whole_and_as_a_stream(own_server: TritonServer) -> None:
    with GrpcClient(own_server.grpc_url, NAME, RUN_LIMIT_S) as client:
        expected = client.generate(GenerateRequest(prompt=PROMPT, max_tokens=6)).text
    python = kept_environment("langchain-nvidia-trt==0.0.1rc0", "langchain-core<0.3")
    assert answers(python, LANGCHAIN, own_server) == [repr(expected)] * 2 and expected


# Its client drops a stream's last response: one token only where nothing slows the server down.
@pytest.mark.timed
def test_llama_index_answers_whole_and_as_a_stream(server: TritonServer) -> None:
    whole, streamed = answers(kept_environment("llama-index-llms-nvidia-triton==0.6.0"), LLAMA_INDEX, server)
    assert whole == streamed and "Paris" in whole


def answers(python: Path, program: str, server: TritonServer) -> list[str]:
    """What a program shows that asks by the port for old clients: a whole answer, and one that was streamed."""
    with OldClientPort(f"{server.host}:0", server.grpc_url) as port:
        command = [str(python), "-c", program, port.address, NAME, PROMPT]
        run = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()[-2:]
