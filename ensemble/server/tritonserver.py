"""Run a stock tritonserver on a model repository: start, wait until it is ready, restart, stop.

A repository's path enters; a running server's addresses leave, or an error of one line. It knows Triton's options and
life cycle, not what the models do. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from deepseek_triton.ensemble.processes.child import has_dead_child, launch
from deepseek_triton.ensemble.processes.temp_dirs import make_directory, remove_directory
from deepseek_triton.ensemble.server.installation import Installation, ServerError, find_tritonserver
from deepseek_triton.ensemble.server.log import failure, loaded_models

__all__ = ["Installation", "ServerError", "TritonServer", "find_tritonserver"]

EXIT_TIMEOUT_S = 10  # how long a stopping server waits for the requests in flight
KILL_MARGIN_S = 10.0  # longest time to unload the models after that
DEAD_CHILD_TIMEOUT_S = 5.0  # for Triton to report that a model's process died at load; some it never reports
POLL_S = 0.1
LOOK_S = 1.0  # between two searches of /proc for a dead child of the server
UNUSABLE_IN_PATHS = re.compile(r"[^\w./+@%:,=~-]")

# A gRPC client that is frozen or unreachable answers no ping: its connection is closed, and its requests end.
KEEPALIVE_OPTIONS = (
    "--grpc-keepalive-time=1000",  # ms without traffic
    "--grpc-keepalive-timeout=1000",  # ms for the answer
    "--grpc-http2-max-pings-without-data=0",  # no limit
)

# APIs that inference doesn't need; only requests with the administrator's header may use them.
RESTRICTED_APIS = "shared-memory,model-config,model-repository,statistics,trace,logging"
ADMIN_HEADER = "x-triton-admin"


class TritonServer:
    """One tritonserver process, its stubs and its temporary files; a context manager.

    Port 0 means any free one. Only `models` and their parts are loaded; empty: all. `log_file` is kept; without one the
    log is removed when the server stops. `is_restricted` reserves RESTRICTED_APIS for requests with `admin_headers`
    (gRPC: with "triton-grpc-protocol-" before the name). `progress` is called with each model's name once it is loaded.
    `extra_args` are passed to tritonserver. Configurations must be complete: Triton's auto-completion, which would
    start each model twice, is off.
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
        installation: Installation | None = None,
    ) -> None:
        check_ports({"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port})
        self.repository = repository
        self.host = host
        self.http_port = http_port
        self.grpc_port = grpc_port
        self.metrics_port = metrics_port
        self.admin_headers = {ADMIN_HEADER: secrets.token_urlsafe(16)} if is_restricted else {}
        self._models = tuple(models)
        self._log_file = log_file
        self._extra_args = tuple(extra_args)
        self._start_timeout_s = start_timeout_s
        self._progress = progress
        self._installation = installation
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded: list[str] = []

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
        installation = self._installation or find_tritonserver()
        self.http_port, self.grpc_port, self.metrics_port = _claim_ports(
            self.host, {"HTTP": self.http_port, "gRPC": self.grpc_port, "metrics": self.metrics_port}
        )
        self._loaded = []
        self._directory = make_directory("tritonserver-")
        try:
            command = [
                str(installation.binary),
                *installation.make_backends(self._directory),
                *self._options(),
            ]
            try:
                self._process = launch(
                    command, installation.environment(), self.log_path, EXIT_TIMEOUT_S + KILL_MARGIN_S
                )
            except OSError as error:
                raise ServerError(f"can't start {installation.binary}: {error}") from error
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until the server ends; returns its exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        return self._running().wait(timeout_s)

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
            self._process = None
        if self._directory is not None:
            remove_directory(self._directory)
            self._directory = None

    def restart(self) -> None:
        """Stop the server if it still runs, and start it on the same ports; the old log is kept as LOG.previous.

        Raises:
            ServerError: as `start`.
        """
        self.stop()
        if self._log_file is not None and self._log_file.exists():
            self._log_file.replace(self._log_file.with_name(f"{self._log_file.name}.previous"))
        self.start()

    def is_ready(self, model: str | None = None) -> bool:
        """Whether the server and all its models, or `model`, answer requests."""
        path = "/v2/health/ready" if model is None else f"/v2/models/{model}/ready"
        connection = http.client.HTTPConnection(self._client_host, self.http_port, timeout=5)
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
        options += [f"--exit-timeout-secs={EXIT_TIMEOUT_S}", *KEEPALIVE_OPTIONS]
        options += [f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}"]
        if self._models:
            options += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in self._models)]
        for header, key in self.admin_headers.items():
            options += [f"--http-restricted-api={RESTRICTED_APIS}:{header}={key}"]
            options += [f"--grpc-restricted-protocol={RESTRICTED_APIS}:{header}={key}"]
        return [*options, *self._extra_args]

    def _wait_until_ready(self) -> None:
        # Triton opens its ports only when all models are loaded; until then its log is the only source of progress.
        deadline = time.monotonic() + self._start_timeout_s
        next_look = 0.0
        died_at: float | None = None
        while True:
            status = self._running().poll()
            self._report_progress()
            if status is not None:
                raise ServerError(self.why_it_ended(status))
            if self.is_ready():
                return
            if time.monotonic() > deadline:
                loaded = ", ".join(self._loaded) or "nothing"
                waited = f"{self._start_timeout_s:g} s"
                raise ServerError(f"tritonserver is not ready after {waited}; loaded so far: {loaded}")
            if (now := time.monotonic()) >= next_look:
                next_look = now + LOOK_S
                died_at = (died_at or now) if has_dead_child(self.pid) else None
            if died_at is not None and now - died_at > DEAD_CHILD_TIMEOUT_S:
                log = failure(self._read_log())
                raise ServerError(f"a model's process died while it loaded, and tritonserver waits for it: {log}")
            time.sleep(POLL_S)

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
        return f"tritonserver ended with status {status}: {failure(self._read_log())}{log}"


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


def _claim_ports(host: str, wanted: dict[str, int]) -> list[int]:
    """The wanted ports, with free ones for those that are 0. They are free now; another process may still take one."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for protocol, port in wanted.items():
            listener = stack.enter_context(socket.socket(socket.AF_INET))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except (OSError, OverflowError) as error:
                is_used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
                what = "is in use; stop what uses it, or" if is_used else f"can't be used: {error};"
                hint = f"{what} choose another (0: any free one)"
                raise ServerError(f"{protocol} port {port} of {host} {hint}") from error
            sockets.append(listener)
        return [listener.getsockname()[1] for listener in sockets]
