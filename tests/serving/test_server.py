from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.ensemble.processes import child
from deepseek_triton.ensemble.processes.hidden_arguments import HiddenArgumentsError
from deepseek_triton.ensemble.server import installation
from deepseek_triton.ensemble.server import tritonserver as server
from deepseek_triton.ensemble.server.installation import ServerDiedError
from deepseek_triton.ensemble.server.log import failed_models, failure, loaded_models
from deepseek_triton.ensemble.server.options import ADMIN_HEADER
from deepseek_triton.ensemble.server.tritonserver import (
    Installation,
    ServerError,
    TritonServer,
    find_tritonserver,
)

try:
    find_tritonserver()
    WHY_NOT = ""
except ServerError as error:
    WHY_NOT = str(error)
needs_server = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

CONFIG = """
name: "NAME"
backend: "python"
max_batch_size: 4
input [{ name: "text" data_type: TYPE_STRING dims: [1] }, { name: "count" data_type: TYPE_INT32 dims: [1] }]
output [{ name: "text" data_type: TYPE_STRING dims: [1] }, { name: "count" data_type: TYPE_INT32 dims: [1] }]
instance_group [{ count: 1 kind: KIND_CPU }]
"""
ECHO = """
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        return [pb.InferenceResponse([self.twice(r, "text"), self.twice(r, "count")]) for r in requests]

    def twice(self, request, name):
        values = pb.get_input_tensor_by_name(request, name).as_numpy()
        return pb.Tensor(name, values + values)
"""
BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("tokenizer.json is missing: build the model again")
"""


def add_model(repository: Path, name: str, code: str) -> Path:
    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(CONFIG.replace("NAME", name))
    (version / "model.py").write_text(code)
    return repository


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the server's temporary files go, so that a test can see what is left."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return add_model(tmp_path / "models", "echo", ECHO)


def fetch(url: str, data: object = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, data=body, headers=headers or {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def group(leader: int) -> list[int]:
    """The processes of `leader`'s group that run, as /proc has them; a zombie doesn't run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def free_ports(repository: Path, **options: Any) -> TritonServer:
    return TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, **options)


@pytest.mark.server
@needs_server
def test_serves_and_leaves_nothing_behind(repository: Path, temporary: Path) -> None:
    loaded: list[str] = []
    with free_ports(repository, progress=loaded.append) as triton:
        assert loaded == ["echo"]
        assert triton.is_ready() and triton.is_ready("echo") and not triton.is_ready("other")
        assert triton.exit_status is None
        status, text = fetch(f"{triton.http_url}/v2/models/echo/generate", {"text": "né", "count": 21})
        assert status == 200
        answer = json.loads(text)
        assert (answer["text"], answer["count"]) == ("néné", 42)
        assert "nv_inference_request_success" in fetch(triton.metrics_url)[1]
        host, port = triton.grpc_url.split(":")
        socket.create_connection((host, int(port)), timeout=5).close()
        log, pid = triton.log_path, triton.pid
        assert log.is_relative_to(temporary)
        assert len(group(pid)) == 3  # the server, its guard and one stub
        regions = Path("/dev/shm")
        (prefix,) = [path.name for path in temporary.iterdir()]
        modes = {stat.S_IMODE(region.stat().st_mode) for region in regions.glob(f"{prefix}-*")}
        assert modes == {0o600}, "other users read prompts and answers"
    assert group(pid) == []
    assert list(temporary.iterdir()) == []
    assert not list(regions.glob(f"{prefix}-*"))
    with pytest.raises(ServerError, match="not running"):
        _ = triton.pid
    triton.stop()  # a second time does nothing


@pytest.mark.server
@needs_server
def test_risky_apis_need_the_key(repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    with free_ports(repository, log_file=log) as triton:
        index = f"{triton.http_url}/v2/repository/index"
        assert fetch(index, {})[0] == 403
        assert fetch(index, {}, {ADMIN_HEADER: "guess"})[0] == 403
        assert fetch(index, {}, triton.admin_headers) == (
            200,
            '[{"name":"echo","version":"1","state":"READY"}]',
        )
        assert fetch(f"{triton.http_url}/v2/models/echo")[0] == 200
        assert fetch(f"{triton.http_url}/v2/models/echo/config")[0] == 403
        (key,) = triton.admin_headers.values()
        shown = Path(f"/proc/{triton.pid}/cmdline").read_bytes()
        assert key.encode() not in shown and b"restricted-api" in shown
    assert "successfully loaded 'echo'" in log.read_text()  # this log was asked for, so it stays


@pytest.mark.server
@needs_server
def test_where_the_key_can_t_be_hidden_the_risky_apis_are_closed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = child.launch

    def without_tracing(*arguments: Any) -> Any:
        if len(arguments) > 4:
            raise HiddenArgumentsError("tracing is forbidden")
        return launch(*arguments)

    monkeypatch.setattr(server, "launch", without_tracing)
    with free_ports(repository) as triton:
        for key in ("", "hidden", "\\nhidden", "nhidden"):
            assert fetch(f"{triton.http_url}/v2/repository/index", {}, {ADMIN_HEADER: key})[0] == 403
        assert triton.is_ready("echo")


@pytest.mark.server
@needs_server
def test_a_model_that_fails_to_load_gives_its_own_error(repository: Path, temporary: Path) -> None:
    add_model(repository, "broken", BROKEN)
    triton = free_ports(repository)
    with pytest.raises(ServerError) as caught:
        triton.start()
    assert str(caught.value) == (
        "tritonserver ended with status 1: "
        "'broken' version 1: ValueError: tokenizer.json is missing: build the model again"
    )
    assert list(temporary.iterdir()) == []


@pytest.mark.server
@needs_server
def test_a_model_that_fails_to_load_takes_no_other_with_it(repository: Path) -> None:
    add_model(repository, "broken", BROKEN)
    failed: list[tuple[str, str]] = []
    options: dict[str, Any] = {"on_failed_model": lambda *reason: failed.append(reason)}
    with free_ports(repository, independent={"echo": ["echo"], "broken": ["broken"]}, **options) as triton:
        assert triton.is_ready("echo") and not triton.is_ready("broken")
        assert triton.is_ready(), "what asks whether the server is ready must not take it out of service"
    assert failed == [("broken", "ValueError: tokenizer.json is missing: build the model again")]
    with pytest.raises(ServerError, match="no model could be loaded: 'broken' version 1: ValueError: tokenizer"):
        free_ports(repository, independent={"broken": ["broken"]}, models=["broken"]).start()


WATCHED = """
import os
from deepseek_triton.ensemble.processes.watchdog import watch


class TritonPythonModel:
    def initialize(self, args):
        self.watchdog = watch("fragile", args["model_version"], "PART")
        END
"""


@pytest.mark.server
@needs_server
def test_a_model_whose_process_dies_while_it_loads_is_left_out_at_the_second_time(
    repository: Path, tmp_path: Path
) -> None:
    add_model(repository, "fragile-tokenizer", WATCHED.replace("PART", "tokenizer").replace("END", ""))
    death = "import time; time.sleep(1); os.kill(os.getpid(), 9)"
    add_model(repository, "fragile-engine", WATCHED.replace("PART", "engine").replace("END", death))
    failed: list[tuple[str, str]] = []
    server = free_ports(
        repository,
        independent={"echo": ["echo"], "fragile": ["fragile-tokenizer", "fragile-engine"]},
        on_failed_model=lambda *reason: failed.append(reason),
        log_file=tmp_path / "log",
    )
    with pytest.raises(ServerDiedError, match="the engine's process was killed by SIGKILL"):
        server.start()
    with server:
        assert server.is_ready("echo") and server.is_ready() and not server.is_ready("fragile-tokenizer")
    ((name, reason),) = failed
    assert name == "fragile"
    assert re.fullmatch(r".* the engine's process was killed by SIGKILL .*; so it went in 2 starts in a row", reason)


@pytest.mark.server
@needs_server
def test_only_the_models_asked_for_are_loaded(repository: Path) -> None:
    add_model(repository, "broken", BROKEN)
    with free_ports(repository, models=["echo"]) as triton:
        assert triton.is_ready("echo") and not triton.is_ready("broken")


STARTER = """
import sys, time
from pathlib import Path
from typing import Any
from deepseek_triton.ensemble.server.tritonserver import TritonServer

server = TritonServer(Path(sys.argv[1]), http_port=0, grpc_port=0, metrics_port=0)
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.server
@needs_server
def test_the_server_ends_with_a_starter_that_is_killed(repository: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", STARTER, str(repository)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=root, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert len(group(pid)) == 3, "tritonserver, its stub and the guard"
        starter.send_signal(signal.SIGKILL)
    try:
        assert wait_until(lambda: group(pid) == []), group(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


@pytest.mark.server
@needs_server
def test_the_server_outlives_the_thread_that_started_it(repository: Path) -> None:
    """Linux ties the parent's death signal to a thread: one that merely starts the server mustn't end it."""
    triton = free_ports(repository)
    starter = threading.Thread(target=triton.start)
    starter.start()
    starter.join()
    try:
        time.sleep(1)
        assert triton.is_ready("echo")
    finally:
        triton.stop()


def script(path: Path, text: str) -> Installation:
    """A server that is a shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return Installation(path)


@pytest.mark.parametrize("protocol", ["http", "grpc", "metrics"])
def test_a_port_in_use_is_named_before_anything_starts(
    repository: Path, temporary: Path, tmp_path: Path, protocol: str
) -> None:
    fake = script(tmp_path / "server", f"touch {tmp_path}/started")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ports = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, f"{protocol}_port": port}
        with pytest.raises(ServerError, match=rf"(?i)^{protocol} port {port} of 127.0.0.1 is in use; "):
            TritonServer(repository, **ports, installation=fake).start()
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "started").exists()


def test_addresses_that_cannot_be_used(repository: Path, tmp_path: Path) -> None:
    fake = script(tmp_path / "server", "exit 0")
    with pytest.raises(ServerError, match=r"^HTTP port 65536 of 127.0.0.1 can't be used: "):
        TritonServer(repository, http_port=65536, installation=fake).start()
    with pytest.raises(ServerError, match=r"^HTTP port 0 of 192.0.2.1 can't be used: "):
        free_ports(repository, host="192.0.2.1", installation=fake).start()
    with pytest.raises(ServerError, match=r"none is not a directory; build a model first"):
        free_ports(tmp_path / "none", installation=fake).start()
    (tmp_path / "my models").mkdir()
    with pytest.raises(ServerError, match=r"my models: Triton .* shell, which takes no ' ' in their path; move or re"):
        free_ports(tmp_path / "my models", installation=fake).start()
    with pytest.raises(ServerError, match=r"can't start .*/nowhere: No such file or directory$"):
        free_ports(repository, installation=Installation(tmp_path / "nowhere")).start()
    with pytest.raises(ServerError, match=r"^can't write the log .*/no/log: No such file or directory; choose"):
        free_ports(repository, installation=fake, log_file=tmp_path / "no" / "log").start()


def test_one_that_ends_at_once_is_reported_with_its_last_words(repository: Path, tmp_path: Path) -> None:
    fake = script(tmp_path / "server", "echo first; echo last >&2; exit 3")
    log = tmp_path / "log"
    log.write_text("failed to load 'old' version 1: yesterday's error\n")
    with pytest.raises(ServerError) as caught:
        free_ports(repository, installation=fake, log_file=log).start()
    assert str(caught.value) == f"tritonserver ended with status 3: first | last (log: {log})"


@pytest.mark.slow
def test_one_that_hangs_is_killed_with_its_children(
    repository: Path, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "EXIT_TIMEOUT_S", 0)
    monkeypatch.setattr(server, "KILL_MARGIN_S", 0.5)
    pids = tmp_path / "pids"
    fake = script(tmp_path / "server", f"trap '' TERM; sleep 600 & echo $$ $! > {pids}; wait; wait; sleep 600")
    with pytest.raises(ServerError, match=r"^tritonserver is not ready after 1 s; loaded so far: nothing$"):
        free_ports(repository, installation=fake, start_timeout_s=1.0).start()
    leader = int(pids.read_text().split()[0])
    assert wait_until(lambda: group(leader) == [], 5.0), group(leader)
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_dies_while_it_loads_is_reported(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 2.51 waits for ever for a stub that has crashed."""
    monkeypatch.setattr(server, "DEAD_CHILD_TIMEOUT_S", 0.3)
    fake = script(tmp_path / "server", "sh -c 'echo out of luck; kill -SEGV $$' & exec sleep 600")  # reaps nobody
    with pytest.raises(ServerError, match=r"^a model's process died .* waits for it: out of luck$"):
        free_ports(repository, installation=fake, start_timeout_s=30.0).start()


@pytest.mark.slow
def test_a_model_that_dies_before_triton_has_met_it_is_named_and_left_out(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "DEAD_CHILD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(server, "KILL_MARGIN_S", 0.5)
    add_model(repository, "fragile", ECHO)
    stub = script(tmp_path / "stub", "sleep 1; kill -SEGV $$")
    started, failed = tmp_path / "started", list[tuple[str, str]]()
    dying = f"{stub.binary} {repository}/fragile/1/model.py"
    fake = script(tmp_path / "server", f"printf '%s ' \"$@\" >> {started}; {dying} & exec sleep 5")
    triton = free_ports(
        repository,
        installation=fake,
        independent={"echo": ["echo"], "fragile": ["fragile"]},
        on_failed_model=lambda *reason: failed.append(reason),
    )
    for _ in range(2):
        with pytest.raises(ServerDiedError, match=r"^fragile's process died while it loaded"):
            triton.start()
    assert [name for name, _ in failed] == ["fragile"]
    assert re.findall(r"--load-model=\S+", started.read_text()) == ["--load-model=echo"]


def test_starting_twice_is_refused(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = script(tmp_path / "server", "exec sleep 600")
    triton = free_ports(repository, installation=fake)
    monkeypatch.setattr(triton, "is_ready", lambda: True)
    with (
        triton,
        pytest.raises(ServerError, match=r"^the server runs already, as process \d+; stop it first$"),
    ):
        triton.start()


def test_log_lines_become_one_reason() -> None:
    stamp = "1123 22:10:05.929407 11421"
    why = "Internal: ValueError: no\\n\\nAt:\\n  x"
    broken = f"E{stamp} model_lifecycle.cc:642] \"failed to load 'a' version 1: {why}\"\n"
    wiring = f'E{stamp} model_repository_manager.cc:703] "Invalid argument: in ensemble m, no such input"\n'
    harmless = f'E{stamp} server.cc:241] "CudaDriverHelper has not been initialized."\n'
    end = "error: creating server: Internal - failed to load all models\n"
    assert failure(harmless + wiring + broken + end) == "'a' version 1: ValueError: no"
    assert (
        failure(broken + broken.replace("'a'", "'b'")) == "'a' version 1: ValueError: no; 'b' version 1: ValueError: no"
    )
    assert failed_models(broken + broken.replace("'a'", "'b'") + broken) == {
        "a": "ValueError: no",
        "b": "ValueError: no",
    }
    assert failed_models(wiring + end) == {}
    assert failure(harmless + wiring + end) == "in ensemble m, no such input"
    assert failure(harmless + end) == "Internal - failed to load all models"
    assert failure("") == "it wrote no log"
    assert loaded_models(f"I{stamp} x.cc:1] \"successfully loaded 'b'\"\n" * 2) == ["b"]


@pytest.fixture
def without_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(installation, "CONTAINER_BINARY", tmp_path / "none")


@pytest.fixture
def wheel(without_container: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A wheel of empty files, and the rest of what it needs."""
    package = tmp_path / "pytriton"
    stub = package / "tritonserver" / "python_backend_stubs" / "3.11" / installation.STUB
    for path in (
        package / "__init__.py",
        package / "tritonserver" / "bin" / "tritonserver",
        package / "tritonserver" / "backends" / "python" / "libtriton_python.so",
        stub,
        tmp_path / "lib" / "libpython3.11.so.1.0",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    spec = importlib.util.spec_from_file_location("pytriton", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.26.4")
    monkeypatch.setattr(installation, "PYTHON", "3.11")
    monkeypatch.setattr(installation, "_library_dirs", lambda: iter([tmp_path / "lib"]))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return package


def test_the_wheel_is_found_without_importing_it(wheel: Path, tmp_path: Path) -> None:
    found = find_tritonserver()
    assert found.binary == wheel / "tritonserver" / "bin" / "tritonserver"
    assert found.library_dirs == (tmp_path / "nvidia_pytriton.libs", tmp_path / "lib")
    assert found.make_backends(tmp_path) == [f"--backend-directory={tmp_path / 'backends'}"]
    names = {path.name for path in (tmp_path / "backends" / "python").iterdir()}
    assert names == {"libtriton_python.so", installation.STUB}
    environment = found.environment()
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert environment["LD_LIBRARY_PATH"].split(":")[:2] == [str(path) for path in found.library_dirs]


def no_numpy(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.setattr(sys, "platform", "darwin"),
            r"none to install on darwin x86_64; use NVIDIA's Triton",
        ),
        (lambda m: m.setattr(platform, "machine", lambda: "aarch64"), r"none to install on linux aarch64"),
        (
            lambda m: m.setattr(importlib.util, "find_spec", lambda name: None),
            r"pip install --no-deps nvidia-pytr",
        ),
        (
            lambda m: m.setattr(installation, "PYTHON", "3.9"),
            r"can't run Python 3.9 models; use Python 3.10 to 3.12",
        ),
        (lambda m: m.setattr(sys, "version_info", (3, 13, 0)), r"use Python 3.10 to 3.12"),
        (
            lambda m: m.setattr(importlib.metadata, "version", lambda n: "2.1.0"),
            r"numpy 2.1.0; .*pip install 'numpy<2'",
        ),
        (
            lambda m: m.setattr(importlib.metadata, "version", no_numpy),
            r"numpy is not installed; run: pip install",
        ),
        (
            lambda m: m.setattr(installation, "_library_dirs", lambda: iter([])),
            r"libpython3.11.so.1.0 is missing; run: apt-get install libpython3.11, or",
        ),
    ],
)
def test_what_keeps_the_wheel_from_running_is_said(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None], message: str
) -> None:
    find_tritonserver()
    change(monkeypatch)
    with pytest.raises(ServerError, match=message):
        find_tritonserver()


def test_half_a_wheel_is_reported(wheel: Path) -> None:
    (wheel / "tritonserver" / "bin" / "tritonserver").unlink()
    with pytest.raises(ServerError, match=r"bin/tritonserver is missing; run: pip install --force-reinstall"):
        find_tritonserver()


def test_a_container_comes_first_and_keeps_its_backends(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    container = wheel.parent / "opt"
    binary, stub = container / "bin" / "tritonserver", container / "backends" / "python" / installation.STUB
    for path in (binary, stub):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(installation, "CONTAINER_BINARY", binary)
    assert find_tritonserver() == Installation(binary)
    assert find_tritonserver().make_backends(wheel) == []
    monkeypatch.setenv("PATH", "/bin")
    first = str(Path(sys.executable).parent)
    stub.write_bytes(b"\0libpython3.11.so.1.0\0")
    assert Installation(binary).environment()["PATH"] == f"{first}:/bin"
    stub.write_bytes(b"\0libpython3.12.so.1.0\0")  # this Python's packages are no use to that stub
    assert Installation(binary).environment()["PATH"] == "/bin"
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/tritonserver")
    assert find_tritonserver() == Installation(Path("/usr/bin/tritonserver"))
