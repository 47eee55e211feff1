"""What several test files share: one demo repository, and two real servers for the whole run."""

from __future__ import annotations

import functools
import gc
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import httpx._transports.default as httpx_transports
import hypothesis
import pytest

from deepseek_triton.ensemble.server.tritonserver import TritonServer
from deepseek_triton.quick_imports import THRESHOLDS, quick_imports
from tests.support.checkpoints import load_reference, smollm2_path, write_tiny

NAME = "smollm2"
MAX_SEQ_LEN = 512
SETTINGS = {"max_num_batched_tokens": 32, "nv_trt_llm_metrics": True}
TINY_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "eos_token_id": 2,
    "tie_word_embeddings": True,
}  # fmt: skip

# Fixtures that are dear → the group of the tests that use them: one worker makes each. The first that fits counts.
SHARED = {
    "smollm2_repository": "server", "server": "server", "tiny_server": "tiny_server",
    "smollm2_reference": "smollm2_reference",
}  # fmt: skip
LONG = ("tests/loadtest/test_run.py",)  # a group without a server that takes as long: one load after the other
ENDED_WITH_GROUP = ("server", "tiny_server", "smollm2_reference")
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("suite")
# `make test` runs so many failed tests at most once more, alone; NOT_AGAIN is the exit status if it must not.
MOST_RUN_AGAIN, NOT_AGAIN = 3, 10
MAX_ID_LEN = 64  # characters of a parameter in a test's name


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many random checkpoints are compared with transformers: a few in each run, thousands when asked."""
    parser.addoption("--checkpoint-examples", type=int, default=12, help="random checkpoints to compare")
    parser.addoption("--checkpoint-first-seed", type=int, default=0, help="the seed of the first one")


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests on one worker, and all tests of a shared server on one; start with the longest groups."""
    for item in items:
        if item.get_closest_marker("xdist_group") is not None:
            continue
        shared = next((group for fixture, group in SHARED.items() if uses_shared(item, fixture)), None)
        item.add_marker(pytest.mark.xdist_group(shared or item.nodeid.partition("::")[0]))
    items.sort(key=rank)


def uses_shared(item: pytest.Item, fixture: str) -> bool:
    """Whether the test uses this file's fixture, not one of the same name that its own file has."""
    if fixture not in getattr(item, "fixturenames", ()):
        return False
    definitions = item._fixtureinfo.name2fixturedefs.get(fixture, ())  # type: ignore[attr-defined]
    return bool(definitions) and definitions[-1].func.__module__ == __name__


failed: list[str] = []  # this run's tests
errors: list[str] = []  # of fixtures: a server that died, say


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember what failed."""
    if report.failed:
        (failed if report.when == "call" else errors).append(report.nodeid)


@pytest.hookimpl(tryfirst=True)  # before the plugin of --last-failed writes them down
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let --last-failed find the tests again: xdist's workers add their group to a test's name.

    The exit status tells whether they may be run again.
    """
    failures = session.config.pluginmanager.get_plugin("lfplugin")
    if failures is not None:
        failures.lastfailed = {without_group(name): is_failed for name, is_failed in failures.lastfailed.items()}
    if session.exitstatus == pytest.ExitCode.TESTS_FAILED and (errors or len(failed) > MOST_RUN_AGAIN):
        session.exitstatus = NOT_AGAIN


def without_group(name: str) -> str:
    """Return "file::test[a]" of "file::test[a]@group"; what a test's parameters hold stays."""
    return re.sub(r"@[^@\]]+$", "", name)


def group_of(item: pytest.Item) -> str:
    """The tests of one group run on one worker, one after the other."""
    return str(next(item.iter_markers("xdist_group")).args[0])


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End a shared server with its group's last test: an idle one, and what watches it, take processor time too.

    And a model of half a gigabyte takes memory.
    """
    is_worker = hasattr(item.config, "workerinput")  # elsewhere the groups are mixed
    if is_worker and nextitem is not None and group_of(nextitem) != (group := group_of(item)):
        for fixture in (name for name, own in SHARED.items() if own == group and name in ENDED_WITH_GROUP):
            for definition in item.session._fixturemanager.getfixturedefs(fixture, item) or ():
                definition.finish(item._request)  # type: ignore[attr-defined]


def rank(item: pytest.Item) -> int:
    """Long groups first, so that no worker is left alone with one at the end: those of shared servers, then others."""
    marks = {mark.name for mark in item.iter_markers()}
    group = group_of(item)
    return 0 if group in SHARED.values() else 1 if "server" in marks or group in LONG else 2 if "slow" in marks else 3


def pytest_make_parametrize_id(val: object) -> str | None:
    """Short names for long parameters: workers send the names of all tests and, for each test, its name in reports."""
    if not isinstance(val, (str, bytes)) or len(val) <= MAX_ID_LEN:
        return None
    return f"{val[:MAX_ID_LEN]!a} of {len(val)}"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What is collected lives to the end: the garbage collector needn't look at it again and again."""
    with quick_imports():
        collected = yield
    gc.set_threshold(*THRESHOLDS)  # a tenth of the processor time of many tests
    return collected


def pytest_configure() -> None:
    """Let Ctrl-C reach the tests and what they start: a run in the background (`make test &`) inherits it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_ssl_context() -> Iterator[None]:
    """httpx reads all certificate authorities for each client, 40 ms: here all share what the first has read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx_transports, "create_ssl_context", functools.cache(httpx.create_ssl_context))
        yield


@pytest.fixture(scope="session", autouse=True)
def _failed_tests_end_their_processes() -> Iterator[None]:
    """`with Popen(…)` waits for the process without a limit: a test that fails in there would hang with its server."""
    leave = subprocess.Popen.__exit__

    def kill_and_leave(process: subprocess.Popen[Any], kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            process.kill()
        leave(process, kind, error, trace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__exit__", kill_and_leave)
        yield


@pytest.fixture(scope="session", autouse=True)
def _builds_share_renderers() -> Iterator[None]:
    """A build ends the processes that render chat templates, and the next would start one: a fifth of a second each.

    That none is left behind is shown with the build as it is (tests/builders/repository/test_repository.py).
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepseek_triton.builders.repository.build.end_workers", lambda: None)
        yield


@pytest.fixture(scope="session")
def smollm2_repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model repository built from SmolLM2's real weights."""
    from deepseek_triton.builders.repository.build import build
    from deepseek_triton.builders.repository.options import BuildOptions

    repository = tmp_path_factory.mktemp("repository") / "models"
    build(BuildOptions(smollm2_path(), NAME, repository, max_seq_len=MAX_SEQ_LEN, settings=SETTINGS, infer=True))
    yield repository
    shutil.rmtree(repository)  # half a gigabyte, of which pytest would keep three


@pytest.fixture(scope="session")
def smollm2_reference() -> Any:
    """SmolLM2's real weights in transformers, whose reading of the GGUF takes seconds."""
    path = smollm2_path()
    return load_reference(path.parent, path.name)


@pytest.fixture(scope="session")
def server(smollm2_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real tritonserver on it."""
    yield from serve(smollm2_repository, tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="session")
def tiny_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with SmolLM2's name, tokenizer and settings."""
    from deepseek_triton.builders.repository.build import build
    from deepseek_triton.builders.repository.options import BuildOptions
    from tests.support.real_tokenizers import smollm2_directory

    directory = tmp_path_factory.mktemp("tiny")
    checkpoint = write_tiny(directory / "checkpoint", **TINY_SMOLLM2)
    shutil.copytree(smollm2_directory(), checkpoint, dirs_exist_ok=True)
    build(BuildOptions(checkpoint, NAME, directory / "models", max_seq_len=MAX_SEQ_LEN, settings=SETTINGS))
    return directory / "models"


@pytest.fixture(scope="session")
def tiny_server(tiny_repository: Path) -> Iterator[TritonServer]:
    """A real tritonserver on it.

    It answers nonsense some twenty times faster: for tests of everything but language and time.
    """
    yield from serve(tiny_repository, tiny_repository.parent)


def serve(repository: Path, log_directory: Path) -> Iterator[TritonServer]:
    """Start a server for the tests, and see that it lives when they are done."""
    if find_spec("pytriton") is None:
        pytest.skip("no tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    log = log_directory / "tritonserver.log"
    with TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, log_file=log) as server:
        yield server
        assert server.exit_status is None, f"the server died during the tests:\n{log.read_text()[-3000:]}"
        end_at_once(server)


def end_at_once(server: TritonServer) -> None:
    """Kill a server that is needed no more: to unload its models takes it three seconds (test_server.py shows it)."""
    os.killpg(server.pid, signal.SIGKILL)
