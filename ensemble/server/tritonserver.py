"""Run a stock tritonserver on a model repository: start, wait until it is ready, restart, stop.

A repository's path enters; a running server's addresses leave, or an error of one line. It knows Triton's options and
life cycle, not what the models do. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from deepseek_triton.ensemble.processes.child import launch
from deepseek_triton.ensemble.processes.heartbeat import POLL_S
from deepseek_triton.ensemble.processes.hidden_arguments import HiddenArgumentsError
from deepseek_triton.ensemble.processes.temp_dirs import close_shared_memory, make_directory, remove_directory
from deepseek_triton.ensemble.server.health import HealthCheck
from deepseek_triton.ensemble.server.installation import Installation, ServerDiedError, ServerError, find_tritonserver
from deepseek_triton.ensemble.server.left_out import MAX_DEATHS, LeftOut, LoadError
from deepseek_triton.ensemble.server.log import death, failed_models, failure, killed_by, loaded_models
from deepseek_triton.ensemble.server.options import ADMIN_HEADER, ADMIN_KEY, restricting_options
from deepseek_triton.ensemble.server.stubs import LoadObserver
from deepseek_triton.free_ports import bind_free_port

__all__ = ["Installation", "ServerError", "TritonServer", "find_tritonserver"]

log = logging.getLogger(__name__)
EXIT_TIMEOUT_S = 10  # how long a stopping server waits for the requests in flight
KILL_MARGIN_S = 10.0  # longest time to unload the models after that
DEAD_CHILD_TIMEOUT_S = 5.0  # for Triton to report that a model's process died at load; some it never reports
READY_POLL_S = 0.1
LOOK_S = 0.25  # between two searches of /proc for dead children of the server
UNUSABLE_IN_PATHS = re.compile(r"[^\w./+@%:,=~-]")

# A gRPC client that is frozen or unreachable answers no ping: its connection is closed, and its requests end.
KEEPALIVE_OPTIONS = (
    "--grpc-keepalive-time=1000",  # ms without traffic
    "--grpc-keepalive-timeout=1000",  # ms for the answer
    "--grpc-http2-max-pings-without-data=0",  # no limit
)

# Marks the requests that came over gRPC: their clients take several responses, where HTTP's `generate` takes one.
GRPC_MARK_OPTION = "--grpc-header-forward-pattern=^user-agent$"


class TritonServer:
    """One tritonserver process, its stubs and its temporary files; a context manager.

    Port 0 means any free one. Only `models` and their parts are loaded; empty: all. `log_file` is kept, and that of an
    earlier start of this object as LOG.previous; without one the log is removed when the server stops. `is_restricted`
    reserves RESTRICTED_APIS for requests with `admin_headers` (gRPC: with "triton-grpc-protocol-" before the name).
    `progress` is called with each model's name once it is loaded. `extra_args` are passed to tritonserver.
    `independent` are the served models of which some may fail to load, as long as one does, each with all models that
    are loaded for it; `on_failed_model` is called with the name of each that failed, or of the part that did, and why.
    One whose process dies, or hangs, in two starts in a row is left out of the next (ensemble/server/left_out.py).
    Configurations must be complete: Triton's auto-completion, which would start each model twice, is off.
    """

    def __init__(
        self,
        repository: Path,
        *,
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        host: str = "127.0.0.1",
        models: Sequence[str] = (),
        log_file: Path | None = None,
        is_restricted: bool = True,
        extra_args: Sequence[str] = (),
        start_timeout_s: float = 600.0,
        progress: Callable[[str], None] | None = None,
        independent: Mapping[str, Collection[str]] | None = None,
        on_failed_model: Callable[[str, str], None] | None = None,
        installation: Installation | None = None,
    ) -> None:
        check_ports({"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port})
        self.repository = repository
        self.host = host
        self.http_port = http_port
        self.grpc_port = grpc_port
        self.metrics_port = metrics_port
        self.admin_headers = (
            {ADMIN_HEADER: os.environ.get(ADMIN_KEY) or secrets.token_urlsafe(16)} if is_restricted else {}
        )
        self._models = tuple(models)
        self._log_file = log_file
        self._extra_args = tuple(extra_args)
        self._start_timeout_s = start_timeout_s
        self._progress = progress
        self._left_out = LeftOut(independent or {})
        self._may_fail = bool(independent)
        self._on_failed_model = on_failed_model
        self._installation = installation
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: list[str] = []
        self._num_starts = 0

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        """Where HTTP clients connect: http://HOST:PORT."""
        return f"http://{self._client_host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """Where gRPC clients connect: HOST:PORT."""
        return f"{self._client_host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus reads."""
        return f"http://{self._client_host}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """The process id of tritonserver, the parent of its models' processes."""
        return self._running().pid

    @property
    def log_path(self) -> Path:
        """The file that the server writes its log to."""
        if self._log_file is not None:
            return self._log_file
        if self._directory is None:
            raise ServerError("the server is not running, and no log_file was given")
        return self._directory / "tritonserver.log"

    @property
    def exit_status(self) -> int | None:
        """None while the server runs."""
        return self._running().poll()

    def start(self) -> None:
        """Start the server and wait until every model is ready.

        Raises:
            ServerError: no server, a path that Triton can't take, a port in use, a model that doesn't load, or the time
                has run out.
        """
        if self._process is not None:
            raise ServerError(f"the server runs already, as process {self.pid}; stop it first")
        if not self.repository.is_dir():
            raise ServerError(f"model repository {self.repository} is not a directory; build a model first")
        if unusable := UNUSABLE_IN_PATHS.search(str(self.repository)):
            raise ServerError(
                f"model repository {self.repository}: Triton starts Python models through a shell, which takes no "
                f"{unusable.group()!r} in their path; move or rename it"
            )
        self._left_out.forgive()
        while True:
            try:
                self._start()
                return
            except LoadError as error:
                left_out = self._left_out.blame(error.models)
                if not left_out:
                    raise
                for name in left_out:
                    if self._on_failed_model is not None:
                        self._on_failed_model(name, f"{error}; so it went in {MAX_DEATHS} starts in a row")

    def _start(self) -> None:
        installation = self._installation or find_tritonserver()
        self.http_port, self.grpc_port, self.metrics_port = _claim_ports(
            self.host, {"HTTP": self.http_port, "gRPC": self.grpc_port, "metrics": self.metrics_port}
        )
        self._loaded = []
        if self._log_file is not None:
            _check_log(self._log_file)
            if self._num_starts:
                self._log_file.replace(self._log_file.with_name(f"{self._log_file.name}.previous"))
        self._num_starts += 1
        self._directory = make_directory("tritonserver-")
        try:
            command = [
                str(installation.binary),
                *installation.make_backends(self._directory),
                *self._options(),
            ]
            try:
                self._process = self._launch(installation, command)
            except OSError as error:
                raise ServerError(f"can't start {installation.binary}: {error}") from error
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _launch(self, installation: Installation, command: list[str]) -> subprocess.Popen[bytes]:
        hidden = self._hidden_options()
        variables = {placeholder: f"HIDDEN_OPTION_{number}" for number, placeholder in enumerate(hidden)}
        environment = installation.environment()
        secret = environment | {variables[placeholder]: option for placeholder, option in hidden.items()}
        grace_s = EXIT_TIMEOUT_S + KILL_MARGIN_S
        try:
            return launch(command, secret, self.log_path, grace_s, variables)
        except HiddenArgumentsError as error:
            # Where Linux forbids tracing, nobody gets the restricted APIs, rather than everybody the key.
            log.warning("the restricted APIs are closed to the administrator too: %s", error)
            self.admin_headers = dict.fromkeys(self.admin_headers, "")
            return launch(command, environment, self.log_path, grace_s)

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until the server ends; returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        return self._running().wait(timeout_s)

    def wait_for_fault(self) -> str:
        """Wait until the server ends, or one of its processes is dead or frozen, and kill it then; returns the reason.

        A frozen server would keep its clients waiting, so it gets no time to end.
        """
        check = HealthCheck(self.pid, self.is_live)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.why_it_ended(self.wait(POLL_S))
            if (fault := check.fault()) is not None:
                self._running().kill()
                status = self.wait()
                return f"tritonserver was ended: {fault}" if status == -signal.SIGKILL else self.why_it_ended(status)

    def stop(self) -> None:
        """End the server and its stubs, and remove the temporary files; nothing happens if it isn't running."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_TIMEOUT_S + KILL_MARGIN_S)
            # The stubs share the server's process group, which is empty after a clean exit.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            _reap_group(self._process.pid)
            self._process = None
        if self._directory is not None:
            remove_directory(self._directory)
            self._directory = None

    def restart(self) -> None:
        """Stop the server if it still runs, and start it on the same ports.

        Raises:
            ServerError: as `start`.
        """
        self.stop()
        self.start()

    def load_only(self, models: Sequence[str]) -> None:
        """Load these models and no others from the next start on; they are named with their parts."""
        self._models = tuple(models)

    def is_ready(self, model: str | None = None) -> bool:
        """Whether the server and all its models, or `model`, answer requests."""
        return self._answers("/v2/health/ready" if model is None else f"/v2/models/{model}/ready", timeout_s=5)

    def is_live(self) -> bool:
        """Whether the server answers within a second."""
        return self._answers("/v2/health/live", timeout_s=1)

    def _answers(self, path: str, timeout_s: float) -> bool:
        connection = http.client.HTTPConnection(self._client_host, self.http_port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerError("the server is not running; start it first")
        return self._process

    @property
    def _client_host(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    @property
    def _shm_prefix(self) -> str:
        """Prefix of the stubs' shared-memory names, so that regions left by killed stubs can be removed."""
        assert self._directory is not None
        return f"{self._directory.name}-"

    def _options(self) -> list[str]:
        address = socket.gethostbyname(self.host)  # Triton wants a number
        options = [f"--model-repository={self.repository}", "--disable-auto-complete-config"]
        for protocol, port in (
            ("http", self.http_port),
            ("grpc", self.grpc_port),
            ("metrics", self.metrics_port),
        ):
            options += [f"--{protocol}-address={address}", f"--{protocol}-port={port}"]
        options += [f"--exit-timeout-secs={EXIT_TIMEOUT_S}", *KEEPALIVE_OPTIONS, GRPC_MARK_OPTION]
        options += [f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}"]
        if self._may_fail:
            options += ["--exit-on-error=false", "--strict-readiness=false"]
        models, left_out = self._models, self._left_out.models
        if left_out:
            every = self._models or sorted(path.parent.name for path in self.repository.glob("[!.]*/config.pbtxt"))
            models = tuple(name for name in every if name not in left_out)
        if models:
            options += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in models)]
        return [*options, *self._hidden_options(), *self._extra_args]

    def _hidden_options(self) -> dict[str, str]:
        options: dict[str, str] = {}
        for header, key in self.admin_headers.items():
            options |= restricting_options(header, key)
        return options

    def _wait_until_ready(self) -> None:
        # Triton opens its ports only when all models are loaded; until then its log is the only source of progress.
        deadline = time.monotonic() + self._start_timeout_s
        observer, next_look = LoadObserver(self.pid), 0.0
        while True:
            status = self._running().poll()
            self._report_progress()
            assert self._directory is not None
            close_shared_memory(self._directory)  # each model's process makes its regions before it loads
            if status is not None:
                raise self._death_at_start(status)
            if self.is_ready():
                self._report_failures()
                self._left_out.has_started()
                return
            if (now := time.monotonic()) > deadline:
                raise self._hang_at_start()
            if now >= next_look:
                next_look = now + LOOK_S
                if observer.look(now) > DEAD_CHILD_TIMEOUT_S:
                    dead = observer.dead_models()
                    what = ", ".join(dead) or "a model"
                    reason = f"{what}'s process died while it loaded, and tritonserver waits for it"
                    raise LoadError(f"{reason}: {failure(self._read_log())}", dead)
            time.sleep(READY_POLL_S)

    def _death_at_start(self, status: int) -> ServerError:
        reason = self.why_it_ended(status)
        if (model := killed_by(self._read_log())) is not None:
            return LoadError(reason, [model])
        return (ServerDiedError if status < 0 else ServerError)(reason)

    def _hang_at_start(self) -> ServerError:
        loaded = ", ".join(self._loaded) or "nothing"
        reason = f"tritonserver is not ready after {self._start_timeout_s:g} s; loaded so far: {loaded}"
        hanging = self._left_out.incomplete(self._loaded)
        return LoadError(reason, hanging) if hanging else ServerError(reason)

    def _report_failures(self) -> None:
        """Tell which models aren't loaded; without a single one that is, the server has nothing to serve."""
        served = self._left_out.served
        if not self._may_fail or all(self.is_ready(name) for name in served):
            return
        log = self._read_log()
        if not any(self.is_ready(name) for name in served):
            raise ServerError(f"no model could be loaded: {failure(log)}")
        for name, reason in failed_models(log).items():
            if self._on_failed_model is not None:
                self._on_failed_model(name, reason)

    def _report_progress(self) -> None:
        loaded = loaded_models(self._read_log())
        for name in loaded[len(self._loaded) :]:
            if self._progress is not None:
                self._progress(name)
        self._loaded = loaded

    def _read_log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def why_it_ended(self, status: int) -> str:
        """One line that explains exit status `status` by the log."""
        log = f" (log: {self._log_file})" if self._log_file else ""
        return f"{death(self._read_log(), status)}{log}"


def _reap_group(group: int) -> None:
    """Reap this process's dead children in `group`: where it is process 1, orphaned stubs have become its own."""
    with contextlib.suppress(ChildProcessError):
        deadline = time.monotonic() + KILL_MARGIN_S
        while time.monotonic() < deadline:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.01)


def check_ports(ports: dict[str, int]) -> None:
    """Refuse a port that two protocols share; 0, any free one, is no port.

    Raises:
        ServerError: names both.
    """
    owners: dict[int, str] = {}
    for protocol, port in ports.items():
        if port and port in owners:
            raise ServerError(
                f"{owners[port]} and {protocol} port are both {port}; give each its own (0: any free one)"
            )
        owners[port] = protocol


def _check_log(path: Path) -> None:
    """Raise ServerError unless the log can be written; it is made if need be, and nothing of it is lost."""
    try:
        path.open("ab").close()
    except OSError as error:
        raise ServerError(f"can't write the log {path}: {error.strerror}; choose another file") from error


def _claim_ports(host: str, wanted: dict[str, int]) -> list[int]:
    """The wanted ports, with free ones for those that are 0. They are free now; another process may still take one."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for protocol, port in wanted.items():
            listener = stack.enter_context(socket.socket(socket.AF_INET))
            try:
                if port:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    listener.bind((host, port))
                else:
                    bind_free_port(listener, host)
            except (OSError, OverflowError) as error:
                is_used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
                what = "is in use; stop what uses it, or" if is_used else f"can't be used: {error};"
                hint = f"{what} choose another (0: any free one)"
                raise ServerError(f"{protocol} port {port} of {host} {hint}") from error
            sockets.append(listener)
        return [listener.getsockname()[1] for listener in sockets]
