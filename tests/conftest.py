"""What several test files share: one demo repository and one real server for the whole run."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from tests.support.checkpoints import smollm2_path

NAME = "smollm2"
MAX_SEQ_LEN = 512

SHARED = ("server", "smollm2_repository")  # fixtures that are dear: one worker makes each, and runs what uses it


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests on one worker, and all tests of the shared server on one; start with the longest groups."""
    for item in items:
        if item.get_closest_marker("xdist_group") is not None:
            continue
        shares = not set(SHARED).isdisjoint(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("server" if shares else item.nodeid.partition("::")[0]))
    items.sort(key=rank)


def rank(item: pytest.Item) -> int:
    """Long groups first, so that no worker is left alone with one at the end."""
    marks = {mark.name for mark in item.iter_markers()}
    return 0 if "server" in marks else 1 if "slow" in marks else 2


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let Ctrl-C reach the processes that tests start: a run in the background (`make test &`) inherits it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
