"""What several test files share: one demo repository and one real server for the whole run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.support.checkpoints import smollm2_path

NAME = "smollm2"
MAX_SEQ_LEN = 512


@pytest.fixture(scope="session")
def smollm2_repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model repository built from SmolLM2's real weights."""
    from deepseek_triton.builders.repository.build import build
    from deepseek_triton.builders.repository.options import BuildOptions

    repository = tmp_path_factory.mktemp("repository") / "models"
    settings = {"max_num_batched_tokens": 32}
    build(BuildOptions(smollm2_path(), NAME, repository, max_seq_len=MAX_SEQ_LEN, settings=settings))
    yield repository
    shutil.rmtree(repository)  # half a gigabyte, of which pytest would keep three


@pytest.fixture(scope="session")
def server(smollm2_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real tritonserver on it."""
    if find_spec("pytriton") is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    log = tmp_path_factory.mktemp("log") / "tritonserver.log"
    with TritonServer(smollm2_repository, http_port=0, grpc_port=0, metrics_port=0, log_file=log) as server:
        yield server
        assert server.exit_status is None, f"the server died during the tests:\n{log.read_text()[-3000:]}"
