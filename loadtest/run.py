"""`python -m deepseek_triton.loadtest.run`: a profile and a server in, a result, a report and an exit status out.

    make loadtest PROFILE=spike                 builds the demo model, serves it, loads it, stops it
    make loadtest PROFILE=spike HOST=10.0.0.7   loads what runs there, and starts nothing
    python -m deepseek_triton.loadtest.run spike --page 8089    Locust's own page instead: http://localhost:8089

`loadtest/status.py` has the exit statuses.
"""

from __future__ import annotations

import deepseek_triton.loadtest.gevent_patch  # noqa: F401  # isort: skip  # before everything else

import argparse
import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment

from deepseek_triton.ensemble.processes.machine import describe
from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer
from deepseek_triton.loadtest import profile, result
from deepseek_triton.loadtest.against import judged_against, machine_name, without_foreign_levels
from deepseek_triton.loadtest.gateway_process import GatewayError, started_gateway
from deepseek_triton.loadtest.interrupts import interrupt_main_greenlet
from deepseek_triton.loadtest.options import GATEWAY_PORT, check_model, make_parser
from deepseek_triton.loadtest.profile import LoadProfile, LoadProfileError
from deepseek_triton.loadtest.report.page import write_report
from deepseek_triton.loadtest.report.text import table
from deepseek_triton.loadtest.result import LoadTestResult, ResultError, assemble
from deepseek_triton.loadtest.session import Session
from deepseek_triton.loadtest.status import Status, status_of
from deepseek_triton.loadtest.target import ServerUnderTest
from deepseek_triton.loadtest.users import ProfileShape, user_classes

PROGRESS_S = 5.0
# On top of a request's timeout: the client stops the request on the server and waits for the acknowledgement.
STOP_MARGIN_S = 10.0
INTERRUPTED_STOP_S = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one profile."""
    arguments = make_parser().parse_args(argv)
    interrupt_main_greenlet()  # at SIGTERM too: the server must stop
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        machine = describe()
        chosen = choose(arguments, machine)
        output = writable(arguments.output or default_output(chosen.name))
        with (
            serve(arguments, needs_gateway=chosen.needs_gateway) as target,
            contextlib.closing(Session(chosen, target, may_be_shared=arguments.shared_machine)) as session,
        ):
            if told := session.trouble():
                return _fail(told)
            run = Run(session, machine, output)
            if arguments.page:
                run.page(arguments.page)
                return Status.OK
            finished = run.headless()
    except (GatewayError, LoadProfileError, ResultError, ServerError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _say("interrupted")
        return Status.INTERRUPTED
    return status_of(finished)


def choose(arguments: argparse.Namespace, machine: dict[str, Any]) -> LoadProfile:
    """The profile, with the levels that it is judged by on this machine."""
    named = profile.load(arguments.profile).scaled(arguments.scale)
    if arguments.against:
        return judged_against(named, result.load(arguments.against), arguments.model, machine)
    chosen = without_foreign_levels(named, machine)
    if chosen.levels != named.levels and named.basis:
        _say(
            f"speed isn't judged: the levels of {named.name} were measured on {named.basis.machine}, this is "
            f"{machine_name(machine)}; --against RESULT.json judges it by a run of this machine"
        )
    return chosen


@contextlib.contextmanager
def serve(arguments: argparse.Namespace, *, needs_gateway: bool) -> Iterator[ServerUnderTest]:
    """The running server at --host, or one that is started for the run; so is the gateway, where it is needed."""
    if arguments.host:
        ports = arguments.http_port, arguments.grpc_port, arguments.metrics_port
        gateway_url = (arguments.gateway or f"http://{arguments.host}:{GATEWAY_PORT}") if needs_gateway else ""
        yield ServerUnderTest.at(arguments.model, arguments.host, *ports, gateway_url)
        return
    if arguments.gateway:
        raise LoadProfileError("--gateway is of a running server: give its --host too")
    check_model(arguments.repository, arguments.model)
    _say(f"starting tritonserver on {arguments.repository}")
    models = [arguments.model]
    with TritonServer(arguments.repository, http_port=0, grpc_port=0, metrics_port=0, models=models) as server:
        with contextlib.ExitStack() as stack:
            gateway_url = ""
            if needs_gateway:
                _say("starting the gateway")
                gateway_url = stack.enter_context(started_gateway(server.grpc_url, arguments.model))
            yield ServerUnderTest(arguments.model, server.http_url, server.grpc_url, server.metrics_url, gateway_url)
        if server.exit_status is not None:
            _say(f"tritonserver ended by itself during the run, with status {server.exit_status}")


class Run:
    """Locust's environment for one session, headless or with its page."""

    def __init__(self, session: Session, machine: dict[str, Any], output: Path) -> None:
        self._session, self._output = session, output
        self._result: LoadTestResult | None = None
        self._started = ""
        self._machine = machine
        self._shape = ProfileShape(session)
        self._environment: Any = Environment(  # Any: much of Locust is untyped
            user_classes=user_classes(session),
            shape_class=self._shape,
            host=session.target.http_url,  # for the page to show
            stop_timeout=session.profile.timeout_s + STOP_MARGIN_S,
            catch_exceptions=True,
        )
        events: Any = self._environment.events
        events.test_start.add_listener(self._on_start)
        events.test_stopping.add_listener(self._on_stopping)
        events.test_stop.add_listener(self._on_stop)
        events.user_error.add_listener(self._on_user_error)
        self._runner: Any = self._environment.create_local_runner()

    def headless(self) -> LoadTestResult:
        """Run the profile once, with a line of progress now and then."""
        ticker = gevent.spawn(self._show_progress)
        try:
            self._runner.start_shape()
            self._runner.shape_greenlet.join()
        except KeyboardInterrupt:
            self._environment.stop_timeout = INTERRUPTED_STOP_S
            raise
        finally:
            self._runner.quit()
            ticker.kill()
        if self._result is None:
            raise RuntimeError("Locust ended the run without telling so")
        return self._result

    def page(self, port: int) -> None:
        """Serve Locust's page until interrupted; each run that is started there is reported on."""
        del sys.argv[1:]  # the page would read them as Locust's own, and end the process
        page: Any = self._environment.create_web_ui("127.0.0.1", port)
        _say(f"Locust's page: http://localhost:{port}; Ctrl-C ends it")
        try:
            page.greenlet.join()
        except KeyboardInterrupt:
            _say("")
        finally:
            self._runner.quit()
            page.stop()

    def _on_start(self, **_: Any) -> None:
        self._started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._session.start()

    def _on_stopping(self, **_: Any) -> None:
        self._session.is_stopping = True

    def _on_user_error(self, exception: BaseException, **_: Any) -> None:
        self._session.num_bugs += 1

    def _on_stop(self, **_: Any) -> None:
        session = self._session
        finished = assemble(session.profile, session.target, self._started, self._machine, session.finish())
        self._output.mkdir(parents=True, exist_ok=True)
        finished.save(self._output / "result.json")
        write_report(finished, self._output / "report.html")
        print(table(finished))
        print(f"wrote {self._output / 'result.json'} and {self._output / 'report.html'}", flush=True)
        self._result = finished

    def _show_progress(self) -> None:
        while True:
            gevent.sleep(PROGRESS_S)
            recorder, duration = self._session.recorder, self._session.profile.duration_s
            at = recorder.now()
            failed = sum(not sample.is_complete for sample in recorder.samples)
            _say(
                f"{'warm-up' if at < 0 else f'{min(at, duration):.0f} of {duration:.0f} s'}: "
                f"{recorder.num_begun - len(recorder.samples)} under way, "
                f"{len(recorder.samples)} done, {failed} of them failed"
            )


def writable(output: Path) -> Path:
    """Make the folder of the run's files, before the run: afterwards its result would be lost.

    Raises:
        ResultError: no file can be written there.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ResultError(f"can't write into {output}: {error.strerror}; choose another --output") from error
    return output


def default_output(name: str) -> Path:
    """A directory of its own for each run."""
    return Path("build") / "loadtest" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return Status.ERROR


if __name__ == "__main__":
    sys.exit(main())
