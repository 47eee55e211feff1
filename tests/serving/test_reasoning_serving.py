"""Reasoning through the real server: DeepSeek's own tokenizer, R1's form of chat, and a tiny model of random weights,
which reasons without end unless it is stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.clients.api import GenerateRequest, Message
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.chat_templates import DEEPSEEK_R1
from tests.support.checkpoints import write_tiny
from tests.support.real_tokenizers import deepseek_directory
from tests.support.serving import TIMEOUT_S

pytestmark = pytest.mark.server
CHAT = [Message("user", "Why is the sky blue?")]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrpcClient]:
    if find_spec("pytriton") is None:  # looked for, not imported: it needs more than is installed
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    directory = tmp_path_factory.mktemp("r1")
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir()
    shutil.copyfile(deepseek_directory() / "tokenizer.json", checkpoint / "tokenizer.json")
    config = json.loads((deepseek_directory() / "tokenizer_config.json").read_text(encoding="utf-8"))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": DEEPSEEK_R1}))
    vocab_size = Tokenizer.from_directory(checkpoint).vocab_size
    write_tiny(checkpoint, vocab_size=vocab_size, max_position_embeddings=256, eos_token_id=1)
    build(BuildOptions(checkpoint, "r1", directory / "models", max_seq_len=256))
    with (
        TritonServer(directory / "models", http_port=0, grpc_port=0, metrics_port=0) as server,
        GrpcClient(server.grpc_url, "r1", TIMEOUT_S) as client,
    ):
        yield client


def test_the_budget_ends_the_reasoning_and_the_answer_follows(client: GrpcClient) -> None:
    request = GenerateRequest(messages=CHAT, max_tokens=24, thinking_token_budget=8, end_id=-1)
    answer = client.generate(request)
    assert answer.reasoning and answer.text and answer.num_output_tokens == 24
    assert "</think>" not in answer.reasoning + answer.text
    chunks = list(client.stream(request))
    assert "".join(chunk.reasoning for chunk in chunks) == answer.reasoning
    assert "".join(chunk.text for chunk in chunks) == answer.text
    first_text = next(i for i, chunk in enumerate(chunks) if chunk.text)
    assert not any(chunk.reasoning for chunk in chunks[first_text + 1 :])


def test_without_a_budget_it_reasons_to_the_end(client: GrpcClient) -> None:
    answer = client.generate(GenerateRequest(messages=CHAT, max_tokens=24, end_id=-1))
    assert answer.reasoning and not answer.text


def test_the_answer_behind_the_reasoning_is_guided(client: GrpcClient) -> None:
    request = GenerateRequest(
        messages=CHAT, max_tokens=40, thinking_token_budget=5, guide_type="choice", guide=["Rayleigh", "Mie"]
    )
    answer = client.generate(request)
    assert answer.text in ("Rayleigh", "Mie") and answer.finish_reason == "stop" and answer.reasoning


def test_both_together_where_the_client_wants_it_so(client: GrpcClient) -> None:
    request = GenerateRequest(
        messages=CHAT, max_tokens=24, thinking_token_budget=8, separate_reasoning=False, end_id=-1
    )
    answer = client.generate(request)
    assert not answer.reasoning and "</think>" in answer.text
