"""The console command `deepseek-gateway`: arguments in, an exit status out."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence

from deepseek_triton.command_parser import CommandParser, PrintVersion
from deepseek_triton.extras import explain_missing
from deepseek_triton.gateway.collection import command as data_command
from deepseek_triton.gateway.protection.keys import command as keys_command
from deepseek_triton.gateway.settings import SETTINGS, GatewaySettings, SettingRow
from deepseek_triton.interrupts import INTERRUPTED, interrupts_arrive
from deepseek_triton.quick_imports import quick_imports

PROGRAM = "deepseek-gateway"
APP = "deepseek_triton.gateway.app:create_from_environment"


@interrupts_arrive()
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0: done; 1: an error, told in one line on stderr; 2 (by SystemExit): wrong usage; 130: interrupted.
    """
    parser = _make_parser()
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        is_told = isinstance(error, OSError | ValueError)
        message = str(error) if is_told else explain_missing(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1


def _make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog=PROGRAM, description="OpenAI's and Anthropic's APIs in front of tritonserver.")
    parser.add_argument("--version", action=PrintVersion, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve the APIs", description="Serve the APIs until SIGTERM or Ctrl-C.")
    for setting in SETTINGS:
        _add_option(serve, setting)
    serve.set_defaults(run=_serve)
    worker = commands.add_parser(
        "worker", help="run the queue's jobs", description="Run the jobs of gateways' queue until SIGTERM or Ctrl-C."
    )
    for setting in SETTINGS:
        _add_option(worker, setting)
    worker.set_defaults(run=_work)
    keys = commands.add_parser("keys", help="make, list and revoke API keys", description=keys_command.__doc__)
    keys_command.add_arguments(keys)
    data = commands.add_parser("data", help="export and delete what was collected", description=data_command.__doc__)
    data_command.add_arguments(data)
    return parser


def _add_option(parser: argparse.ArgumentParser, setting: SettingRow) -> None:
    """Add one setting; absent: its environment variable, else its default."""
    meaning = setting.meaning[0].lower() + setting.meaning[1:].removesuffix(".")
    default = "" if setting.is_list or setting.default == "" else f" (default: {setting.default})"
    help_text = f"{meaning}{default}".replace("%", "%%")
    if isinstance(setting.default, bool):
        parser.add_argument(
            setting.option, dest=setting.field, action=argparse.BooleanOptionalAction, default=None, help=help_text
        )
    else:
        parser.add_argument(
            setting.option, dest=setting.field, action="append" if setting.is_list else "store", help=help_text
        )


def read_settings(arguments: argparse.Namespace) -> GatewaySettings:
    """The settings of the command line and of the environment. Raises `ValueError`."""
    given = dict(os.environ)
    for setting in SETTINGS:
        value = getattr(arguments, setting.field)
        if value is not None:
            given[setting.variable] = ",".join(value) if setting.is_list else str(value)
    return GatewaySettings.from_mapping(given)


def _serve(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    with quick_imports():
        from deepseek_triton.gateway import app  # noqa: F401  # a package that is missing is told here, in one line
        from deepseek_triton.gateway.observe.tracing import make_tracer
        from deepseek_triton.gateway.protection.server import check_exposure

    check_exposure(settings)
    make_tracer(settings.trace_endpoint).close()
    if settings.collect:
        _check_collection(settings)

    os.environ.update(settings.to_mapping())  # of this process and of its workers
    with _counting_together(settings.workers):
        _run(settings)
    return 0


def _check_collection(settings: GatewaySettings) -> None:
    """Say that answers are collected. Raises `ValueError`, `OSError` for a wrong redactor or directory."""
    from deepseek_triton.gateway.collection.collector import make_collector
    from deepseek_triton.gateway.collection.redactor import RedactionError, Redactor
    from deepseek_triton.gateway.observe.metrics import GatewayMetrics

    make_collector(settings, GatewayMetrics())
    redactor = Redactor(settings.collect_redactor, settings.collect_redactor_s)
    try:
        redactor.start()
    except RedactionError as error:
        raise ValueError(f"--collect-redactor: {error}") from error
    redactor.close()
    print(
        f"answers are collected in {settings.collect} for {settings.collect_days} days,"
        f" redacted by {settings.collect_redactor}; `store: false` in a request, and `keys collect ID off`, exempt",
        file=sys.stderr,
    )


def _work(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    if not settings.redis_url or not settings.job_concurrency:
        raise ValueError("a worker needs --redis-url, and a --job-concurrency of at least 1")
    with quick_imports():
        from deepseek_triton.gateway.app import create_app
        from deepseek_triton.gateway.observe.logs import set_up

    set_up(settings.log_level, is_json=settings.log_json)

    async def work() -> None:
        is_ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, is_ended.set)
        async with create_app(settings).state.alone():
            await is_ended.wait()

    asyncio.run(work())
    return 0


@contextlib.contextmanager
def _counting_together(workers: int) -> Iterator[None]:
    """Several workers' metrics are summed from files in a folder of this run."""
    if workers == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="deepseek-gateway-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        yield


def _run(settings: GatewaySettings) -> None:
    import uvicorn

    from deepseek_triton.gateway.protection.server import uvicorn_options

    uvicorn.run(
        APP,
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        **uvicorn_options(settings),
    )


if __name__ == "__main__":
    sys.exit(main())
