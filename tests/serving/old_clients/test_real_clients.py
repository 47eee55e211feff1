"""The clients themselves, unmodified, from PyPI, each in a virtual environment of its own.

pip fills the environments once. A client that can't be had is skipped with pip's reason.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_triton.ensemble.server.old_clients import OldClientPort
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME, serve
from tests.support.environments import kept_environment

# LlamaIndex's client drops a stream's last response: one token only where nothing slows the server down.
pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timed]

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
CLIENTS = {
    "langchain-nvidia-trt": (["langchain-nvidia-trt==0.0.1rc0", "langchain-core<0.3"], LANGCHAIN),
    "llama-index-llms-nvidia-triton": (["llama-index-llms-nvidia-triton==0.6.0"], LLAMA_INDEX),
}


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A Python that has the client, and a program that prints a whole answer and a streamed one."""
    packages, program = CLIENTS[request.param]
    return kept_environment(*packages), program


@pytest.fixture
def own_server(smollm2_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Each client's own: Triton 2.51 dies of what LangChain's mixes on one stream, now and then (SECURITY.md)."""
    yield from serve(smollm2_repository, tmp_path_factory.mktemp("log"))


@pytest.fixture
def old_port(own_server: TritonServer) -> Iterator[str]:
    with OldClientPort(f"{own_server.host}:0", own_server.grpc_url) as port:
        yield port.address


def test_the_library_answers_whole_and_as_a_stream(client: tuple[Path, str], old_port: str) -> None:
    python, program = client
    command = [str(python), "-c", program, old_port, NAME, PROMPT]
    run = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S)
    assert run.returncode == 0, run.stderr[-2000:]
    whole, streamed = run.stdout.splitlines()[-2:]
    assert whole == streamed and "Paris" in whole
