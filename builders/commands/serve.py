"""`deepseek-triton serve`: tritonserver on a model repository, until it is told to stop.

Ctrl-C ends it with status 130, SIGTERM with 0. A server that ends by itself, or that has a dead or frozen process, is
started again, and serves what it served before even where the repository has a newer version by then.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from deepseek_triton.builders.commands.models import add_repository_positional

RESTORED = "deepseek-triton-served-"  # prefix of the directory that holds a repository as it was
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}  # tritonserver's own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_repository_positional(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for name, default in PORTS.items():
        parser.add_argument(
            f"--{name}-port",
            type=int,
            default=default,
            metavar="PORT",
            help=f"{name} port; 0: any free one (default: %(default)s)",
        )
    parser.add_argument(
        "--old-grpc-port",
        type=int,
        metavar="PORT",
        help="also listen here for gRPC clients whose tensors have other types (langchain-nvidia-trt) or no batch "
        "dimension (vllm_backend's); 0: any free one",
    )
    parser.add_argument(
        "--trace-endpoint",
        default="",
        metavar="URL",
        help="OTLP collector that gets OpenTelemetry's spans over HTTP, as http://localhost:4318 (default: none)",
    )
    parser.add_argument(
        "--routes",
        type=Path,
        metavar="FILE",
        help="the gateway's route file: models that it gives no request are not loaded, `promote` and `rollback` load "
        "and unload at run time, and after a crash what the routes name is served",
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="write the server's log here")
    parser.add_argument(
        "--max-restarts",
        type=int,
        metavar="N",
        help="give up after so many restarts in a row, 0 or more (default: never give up)",
    )
    parser.add_argument(
        "--newest-after-crash",
        action="store_true",
        help="after a crash, serve what is newest in the repository, not what was served before",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from deepseek_triton.builders.commands.first_request import send_first_requests
    from deepseek_triton.builders.commands.restarts import SameAgain
    from deepseek_triton.builders.lifecycle.promotion.route import routed_models
    from deepseek_triton.builders.repository.check import parts_of_models, sound_models
    from deepseek_triton.builders.repository.models.built import edited_configs
    from deepseek_triton.builders.tune.repository import finish_pending
    from deepseek_triton.clients.printable import printable
    from deepseek_triton.ensemble.processes.temp_dirs import temporary_directory
    from deepseek_triton.ensemble.server.old_clients import OldClientPort
    from deepseek_triton.ensemble.server.options import tracing_options
    from deepseek_triton.ensemble.server.supervisor import supervise
    from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer, check_ports

    old_clients: list[Any] = []
    repository: Path = arguments.repository
    is_quiet: bool = arguments.quiet
    received: list[int] = []

    def say(line: str) -> None:
        if not is_quiet:
            print(line, flush=True)

    def interrupt(number: int, frame: FrameType | None) -> Any:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        if arguments.max_restarts is not None and arguments.max_restarts < 0:
            raise ServerError(f"--max-restarts is {arguments.max_restarts}, must be at least 0")
        try:
            trace_args = tracing_options(arguments.trace_endpoint)
        except ValueError as error:
            raise ServerError(str(error)) from error
        check_ports({"HTTP": arguments.http_port, "gRPC": arguments.grpc_port, "metrics": arguments.metrics_port})
        for name in finish_pending(repository):
            say(f"{name}: finished writing the configuration that a killed `tune` had chosen")
        for name in finish_pending(repository, "configure"):
            say(f"{name}: finished writing the settings of a killed `configure`")
        sound, problems = sound_models(repository)
        for problem in problems:
            print(printable(f"not served: {problem}"), file=sys.stderr, flush=True)
        for path in edited_configs(repository):
            say(f"{path} was edited by hand; use `deepseek-triton configure`, which a build keeps")
        parts = {name: names for name, names in parts_of_models(repository).items() if name in sound}
        if arguments.routes is not None:
            parts = routed_models(arguments.routes, parts)
            sound = [name for names in parts.values() for name in names]
        served = list(parts)
        say(f"starting tritonserver on {repository}")
        server = TritonServer(
            repository,
            host=arguments.host,
            http_port=arguments.http_port,
            grpc_port=arguments.grpc_port,
            metrics_port=arguments.metrics_port,
            log_file=arguments.log,
            extra_args=trace_args,
            # Triton would stop at a model of which there is only the configuration.
            # With routes the models are named too: it is what lets `promote` load and unload others.
            models=sound
            if arguments.routes is not None or len(sound) < sum(path.is_dir() for path in repository.iterdir())
            else (),
            progress=lambda name: say(f"ready: {name}"),
            independent=parts if len(served) > 1 else None,
            on_failed_model=lambda name, why: print(
                printable(f"not served: {name}: {why}"), file=sys.stderr, flush=True
            ),
        )

        def open_old_port(server: TritonServer) -> None:
            """Open it, or after a restart open it again where it was."""
            if arguments.old_grpc_port is None:
                return
            address = f"{arguments.host}:{arguments.old_grpc_port}"
            for port in old_clients:
                address = port.address
                port.close()
            old_clients[:] = [OldClientPort(address, server.grpc_url)]
            say(f"gRPC for old clients: {old_clients[0].address}")

        with temporary_directory(RESTORED) as directory:
            same_again = SameAgain(repository, directory, lambda line: print(line, flush=True))

            def on_restart(reason: str, wait_s: float) -> None:
                print(f"{reason}; starting it again in {wait_s:.1f} s", flush=True)
                if arguments.routes is not None:
                    now = routed_models(arguments.routes, parts_of_models(repository))
                    server.load_only([name for names in now.values() for name in names])
                elif not arguments.newest_after_crash:
                    same_again.prepare(server)

            def on_ready(server: TritonServer) -> None:
                send_first_requests(server, repository, served, lambda line: print(line, file=sys.stderr, flush=True))
                say(describe_server(server, repository, served))
                open_old_port(server)

            supervise(
                server,
                on_ready=on_ready,
                on_restart=on_restart,
                max_restarts=arguments.max_restarts,
            )
    except KeyboardInterrupt:
        if received[:1] == [signal.SIGTERM]:
            return 0
        raise
    finally:
        for port in old_clients:
            port.close()
    return 0


def describe_server(server: Any, repository: Path, models: Sequence[str]) -> str:
    """A command for each way to ask each of `models` that is ready, and the address of the metrics."""
    from deepseek_triton.builders.repository.check import is_scoring_model
    from deepseek_triton.builders.tune.repository import newest_version
    from deepseek_triton.clients.examples import examples, score_examples
    from deepseek_triton.ensemble.protocol.pipelines import SCORER_SUFFIX, model_name
    from deepseek_triton.ensemble.scoring.profile import ScoringProfile

    lines = []
    for model in models:
        if not server.is_ready(model):
            continue
        if is_scoring_model(repository, model):
            profile = ScoringProfile.load(newest_version(repository / model_name(model, SCORER_SUFFIX)))
            ways = score_examples(model, server.http_url, server.grpc_url, has_labels=bool(profile.labels))
        else:
            ways = examples(model, server.http_url, server.grpc_url)
        lines += [f"\n# {title}\n{command}" for title, command in ways.items()]
    return "\n".join([*lines, f"\nmetrics: {server.metrics_url}", "Ctrl-C stops the server"])
