"""A detokenizer that a busy machine doesn't run for a while: no client counts as gone for that."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator

import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.clients import GenerateRequest, GrpcClient
from deepseek_triton.ensemble.processes.watchdog import process_files
from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.conftest import TINY_SMOLLM2, serve
from tests.support.checkpoints import write_tiny
from tests.support.real_tokenizers import smollm2_directory
from tests.support.serving import metrics

pytestmark = [pytest.mark.server, pytest.mark.slow]

CANCEL_AFTER_S = 0.4
STOPPED_S = 0.55  # longer than the engine's patience, shorter than what the watchdog takes for a fault


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server of a tiny model that soon gives up a client."""
    folder = tmp_path_factory.mktemp("hasty")
    checkpoint = write_tiny(folder / "checkpoint", **TINY_SMOLLM2)
    shutil.copytree(smollm2_directory(), checkpoint, dirs_exist_ok=True)
    settings = {"cancel_after_s": CANCEL_AFTER_S}
    build(BuildOptions(checkpoint, "tiny", folder / "models", max_seq_len=2048, settings=settings))
    yield from serve(folder / "models", folder)


def test_no_client_is_lost(hasty: TritonServer) -> None:
    detokenizer = next(path for path in process_files(hasty.pid) if path.suffix == ".detokenizer")
    pid = int(detokenizer.read_text())
    with GrpcClient(hasty.grpc_url, "tiny") as client:
        request = GenerateRequest(prompt="Hello", max_tokens=2000, min_tokens=2000)
        chunks = client.stream(request)
        next(chunks)
        for _ in range(3):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(STOPPED_S)  # or the watchdog would take it for one stop
        *_, last = chunks
        assert last.finish_reason == "length"
    assert metrics(hasty, "tiny")["requests_cancelled_total"] == 0
