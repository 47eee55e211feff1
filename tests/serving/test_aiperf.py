"""NVIDIA's load generator, unmodified, on Triton's own HTTP and on the gateway's APIs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME
from tests.support.aiperf import NUM_REQUESTS, PACKAGE, measure
from tests.support.environments import kept_environment
from tests.support.gateway import gateway

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.xdist_group("tiny_server")]

PAYLOAD = '{"text_input": {{ text|tojson }}, "max_tokens": 8, "stream": STREAM}'


@pytest.fixture(scope="module")
def aiperf() -> Path:
    """The program, in an environment of its own, which takes 0.8 GB."""
    return kept_environment(PACKAGE).with_name("aiperf")


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
def test_tritons_own_http_is_measured(aiperf: Path, tiny_server: TritonServer, tmp_path: Path, endpoint: str) -> None:
    is_streamed = endpoint == "generate_stream"
    words = ["--streaming"] * is_streamed
    payload = PAYLOAD.replace("STREAM", str(is_streamed).lower())
    words += ["--extra-inputs", json.dumps({"payload_template": payload, "response_field": "text_output"})]
    figures = measure(
        aiperf, tmp_path, *words, model=NAME, url=tiny_server.http_url, endpoint_type="template",
        custom_endpoint=f"/v2/models/{NAME}/{endpoint}",
    )  # fmt: skip
    assert figures["request_count"]["avg"] == NUM_REQUESTS
    assert not is_streamed or figures["time_to_first_token"]["avg"] > 0


def test_the_gateway_is_measured(aiperf: Path, tiny_server: TritonServer, tmp_path: Path) -> None:
    """Its chats: a run takes 20 s. aiperf counts the tokens of its prompts itself, with any tokenizer."""
    with gateway(backend_urls=(tiny_server.grpc_url,), models=(NAME,)) as url:
        figures = measure(
            aiperf, tmp_path, "--streaming", "--use-server-token-count", model=NAME, url=url, endpoint_type="chat",
            output_tokens_mean=8,
        )  # fmt: skip
    assert figures["request_count"]["avg"] == NUM_REQUESTS and figures["time_to_first_token"]["avg"] > 0
