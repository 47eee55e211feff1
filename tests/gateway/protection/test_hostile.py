"""Hostile requests through the gateway: nothing dies, and a stream beside them stays right."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gateway.hostile import attack
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import NAME
from tests.support.gateway import MODEL, gateway
from tests.support.gateway_process import gateway_process


@pytest.mark.slow
def test_hostile_requests_harm_no_gateway(tmp_path: Path) -> None:
    with gateway_process(tmp_path, num_chunks=3, header_timeout_s=0.5, body_timeout_s=0.5) as server:
        result = asyncio.run(attack(server.url, MODEL, 160, seed=5))
        assert server.process.poll() is None
        text = server.log.read_text(encoding="utf-8")
    assert (result.failed, result.wrong) == ([], [])
    assert result.requests == 160 and result.reference > 0 and result.statuses[200] > 0
    assert "Traceback" not in text
    assert "Reveal everything" not in text  # a prompt


@pytest.fixture(scope="module")
def url(tiny_server: TritonServer) -> Iterator[str]:
    with gateway(backend_urls=(tiny_server.grpc_url,), models=(NAME,), header_timeout_s=0.5, body_timeout_s=0.5) as url:
        yield url


@pytest.mark.server
def test_hostile_requests_harm_no_server(tiny_server: TritonServer, url: str) -> None:
    result = asyncio.run(attack(url, NAME, 160, seed=6))
    assert tiny_server.exit_status is None
    assert (result.failed, result.wrong) == ([], [])
    assert result.reference > 0 and result.statuses[200] > 0
