"""`deepseek-triton serve`: tritonserver on a model repository, until it is told to stop.

Ctrl-C ends it with status 130, SIGTERM with 0. A server that ends by itself is started again.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from types import FrameType
from typing import Any

PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}  # tritonserver's own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "repository",
        type=Path,
        nargs="?",
        default=Path("model_repository"),
        help="model repository (default: %(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for name, default in PORTS.items():
        parser.add_argument(
            f"--{name}-port",
            type=int,
            default=default,
            metavar="PORT",
            help=f"{name} port; 0: any free one (default: %(default)s)",
        )
    parser.add_argument("--log", type=Path, metavar="FILE", help="write the server's log here")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from deepseek_triton.builders.repository.check import built_models, require_sound
    from deepseek_triton.builders.tune.repository import finish_pending
    from deepseek_triton.ensemble.server.supervisor import supervise
    from deepseek_triton.ensemble.server.tritonserver import TritonServer, check_ports

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
        check_ports({"HTTP": arguments.http_port, "gRPC": arguments.grpc_port, "metrics": arguments.metrics_port})
        for name in finish_pending(repository):
            say(f"{name}: finished writing the configuration that a killed `tune` had chosen")
        require_sound(repository)
        built = built_models(repository)
        say(f"starting tritonserver on {repository}")
        server = TritonServer(
            repository,
            host=arguments.host,
            http_port=arguments.http_port,
            grpc_port=arguments.grpc_port,
            metrics_port=arguments.metrics_port,
            log_file=arguments.log,
            # Triton would stop at a model of which there is only the configuration.
            models=built if len(built) < sum(path.is_dir() for path in repository.iterdir()) else (),
            progress=lambda name: say(f"ready: {name}"),
        )
        supervise(
            server,
            on_ready=lambda server: say(describe_server(server, repository)),
            on_restart=lambda reason: print(f"{reason}; starting it again", flush=True),
        )
    except KeyboardInterrupt:
        if received[-1:] == [signal.SIGTERM]:
            return 0
        raise
    return 0


def describe_server(server: Any, repository: Path) -> str:
    """A command for each way to ask each model, and the address of the metrics."""
    from deepseek_triton.builders.repository.check import is_scoring_model, served_models
    from deepseek_triton.builders.tune.repository import newest_version
    from deepseek_triton.clients.examples import examples, score_examples
    from deepseek_triton.ensemble.protocol.pipelines import SCORER_SUFFIX, model_name
    from deepseek_triton.ensemble.scoring.profile import ScoringProfile

    lines = []
    for model in served_models(repository):
        if is_scoring_model(repository, model):
            profile = ScoringProfile.load(newest_version(repository / model_name(model, SCORER_SUFFIX)))
            ways = score_examples(model, server.http_url, server.grpc_url, has_labels=bool(profile.labels))
        else:
            ways = examples(model, server.http_url, server.grpc_url)
        lines += [f"\n# {title}\n{command}" for title, command in ways.items()]
    return "\n".join([*lines, f"\nmetrics: {server.metrics_url}", "Ctrl-C stops the server"])
