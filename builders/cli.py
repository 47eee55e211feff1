"""The console command `deepseek-triton`: arguments in, an exit status out.

The one place that knows every part of the house; each command imports what it needs when it runs, so that a
machine with only the client installed can still `chat`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0: done; 1: an error, told in one line on stderr; 2: wrong usage; 130: interrupted.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except (ModuleNotFoundError, RuntimeError) as error:
        missing = error.__cause__ or error  # tritonclient makes a RuntimeError of what it misses
        name = missing.name or "" if isinstance(missing, ModuleNotFoundError) else ""
        extra = MODULE_EXTRAS.get(name.split(".")[0])
        if extra is None:
            raise
        return _fail(f"{name} is not installed; pip install 'deepseek-triton[{extra}]'")


MODULE_EXTRAS = {
    "gguf": "build", "ml_dtypes": "build", "onnx": "build", "tqdm": "build", "google": "build",
    "httpx": "client", "tritonclient": "client", "grpc": "client",
    "onnxruntime": "serve", "tokenizers": "serve", "jinja2": "serve",
    "cuda": "tensorrt", "matplotlib": "plot", "scipy": "fit", "sklearn": "fit", "tomli": "load",
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    parser = argparse.ArgumentParser(
        prog="deepseek-triton", description="Build a Triton model repository from a checkpoint, and serve it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_build_command(commands)

    _add_evaluate_command(commands)

    check = commands.add_parser("check", help="validate a model repository without a server")
    check.add_argument("repository", type=Path, nargs="?", default=Path("model_repository"))
    check.set_defaults(run=_check)

    serve = commands.add_parser("serve", help="run tritonserver on a model repository until interrupted")
    serve.add_argument("repository", type=Path, nargs="?", default=Path("model_repository"))
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    for port, default in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        serve.add_argument(f"--{port}-port", type=int, default=default, help="default: %(default)s; 0: any free one")
    serve.add_argument("--log", type=Path, help="write the server's log here")
    serve.set_defaults(run=_serve)

    _add_fit_command(commands)

    _add_tune_command(commands)

    _add_client_commands(commands)

    compare = commands.add_parser("compare", help="two load tests: differences with their confidence intervals")
    compare.add_argument("a", type=Path, help="result.json of the earlier run")
    compare.add_argument("b", type=Path, help="result.json of the later run")
    compare.set_defaults(run=_compare)
    return parser


def _add_build_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from deepseek_triton.builders.commands.scoring_arguments import add_scoring_arguments
    from deepseek_triton.builders.fp8.recipe import RECIPES
    from deepseek_triton.builders.repository.options import ENGINE_OPTIONS, PRECISIONS, TARGETS, TASKS

    build = commands.add_parser("build", help="checkpoint to model repository")
    build.add_argument("checkpoint", type=Path, help="Hugging Face directory or .gguf file")
    build.add_argument("--name", required=True, help="name of the served model")
    build.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    build.add_argument("--target", default="onnx", choices=TARGETS, help="default: %(default)s")
    build.add_argument("--task", default="generate", choices=TASKS, help="default: %(default)s")
    build.add_argument(
        "--precision", choices=PRECISIONS, help="default: fp32 for onnx, fp16 for TensorRT, fp8 for cuda"
    )
    build.add_argument("--max-seq-len", type=int, help="tokens, prompt and answer (default: the model's, at most 2048)")
    for name, (kind, what) in ENGINE_OPTIONS.items():
        form: dict[str, Any] = {"action": "store_const", "const": True} if kind is bool else {"type": kind}
        build.add_argument("--" + name.replace("_", "-"), help=what, **form)
    fp8 = build.add_argument_group("FP8")
    fp8.add_argument("--recipe", default="default", choices=sorted(RECIPES), help="default: %(default)s")
    fp8.add_argument("--keep", action="append", default=[], metavar="PATTERN", help="modules that are not quantised")
    fp8.add_argument("--calibration-text", type=Path, help="text file (default: a built-in set, and the model's own)")
    fp8.add_argument("--ranges", type=Path, help="activation ranges: read where the file exists, else written")
    tensorrt = build.add_argument_group("TensorRT")
    tensorrt.add_argument("--compute-capability", help="of the GPU that will serve, as 8.9 (default: this machine's)")
    tensorrt.add_argument("--timing-cache", type=Path, help="file kept from build to build")
    add_scoring_arguments(build.add_argument_group("task score"))
    build.set_defaults(run=_build)


def _add_evaluate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from deepseek_triton.builders.fp8.recipe import RECIPES

    evaluate = commands.add_parser("evaluate", help="what FP8 costs in quality, against the float checkpoint")
    evaluate.add_argument("checkpoint", type=Path, help="Hugging Face directory or .gguf file: the float reference")
    evaluate.add_argument("--text", type=Path, required=True, help="UTF-8 text to predict")
    evaluate.add_argument("--artefact", type=Path, help="model.onnx, or the directory it is in (default: quantise now)")
    evaluate.add_argument("--recipe", default="default", choices=sorted(RECIPES), help="default: %(default)s")
    evaluate.add_argument("--ranges", type=Path, help="activation ranges: read where the file exists, else written")
    evaluate.add_argument("--tokens", type=int, default=8176, help="tokens to predict (default: %(default)s)")
    evaluate.add_argument("--window", type=int, default=512, help="tokens in a window (default: %(default)s)")
    evaluate.add_argument("--output", type=Path, help="directory for quality.json and quality.png")
    evaluate.set_defaults(run=_evaluate)


def _add_fit_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from deepseek_triton.builders.scoring.fit import METHODS

    fit = commands.add_parser("fit", help="calibrate a scoring model on labelled examples")
    fit.add_argument("model", help="name of the scoring model")
    fit.add_argument("examples", type=Path, help='JSON lines of {"text": …, "label": …}')
    fit.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    fit.add_argument("--method", default="bias", choices=METHODS, help="default: %(default)s")
    fit.set_defaults(run=_fit)


def _add_tune_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tune = commands.add_parser("tune", help="find the configuration that serves most within a latency limit")
    tune.add_argument("model", help="name of the served model")
    tune.add_argument("--p99-ms", type=float, required=True, help="limit of the 99th percentile of a request's latency")
    tune.add_argument("--repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    tune.add_argument("--clients", type=int, default=16, help="asking at once (default: %(default)s)")
    tune.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default: %(default)g)")
    tune.add_argument(
        "--rounds", type=int, default=8, help="measurements of each before one is chosen (default: %(default)s)"
    )
    tune.add_argument("--budget-s", type=float, default=900.0, help="seconds in all (default: %(default)g)")
    tune.add_argument("--texts", type=Path, help="what clients send, a text a line (default: a built-in set)")
    tune.add_argument("--labels", metavar="A,B,…", help="for a scoring model built without")
    tune.add_argument("--max-tokens", type=int, default=32, help="generated for a request (default: %(default)s)")
    tune.add_argument("--output", type=Path, help="directory of journal, table and plot (default: tune-MODEL)")
    tune.add_argument("--dry-run", action="store_true", help="leave the repository as it is")
    tune.set_defaults(run=_tune)


def _add_client_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from deepseek_triton.clients import cli as clients
    from deepseek_triton.clients import score_cli as scoring

    generate = commands.add_parser("generate", help="complete a text")
    clients.add_generate_arguments(generate)
    generate.set_defaults(run=clients.run_generate)
    score = commands.add_parser("score", help="choose among labels for a text")
    scoring.add_score_arguments(score)
    score.set_defaults(run=scoring.run_score)
    chat = commands.add_parser("chat", help="talk to a model")
    clients.add_chat_arguments(chat)
    chat.set_defaults(run=clients.run_chat)


def _build(arguments: argparse.Namespace) -> int:
    from deepseek_triton.builders.commands.scoring_arguments import read_scoring_options
    from deepseek_triton.builders.errors import BuildError
    from deepseek_triton.builders.repository.build import build
    from deepseek_triton.builders.repository.options import ENGINE_OPTIONS, PRECISIONS_OF, BuildOptions

    bar = _ProgressBar()
    try:
        given = {name: getattr(arguments, name) for name in ENGINE_OPTIONS}
        options = BuildOptions(
            checkpoint=arguments.checkpoint,
            name=arguments.name,
            repository=arguments.repository,
            target=arguments.target,
            task=arguments.task,
            precision=arguments.precision or PRECISIONS_OF[arguments.target][0],
            max_seq_len=arguments.max_seq_len,
            settings={name: value for name, value in given.items() if value is not None},
            recipe=arguments.recipe,
            keep=tuple(arguments.keep),
            calibration_text=arguments.calibration_text,
            ranges=arguments.ranges,
            compute_capability=arguments.compute_capability,
            timing_cache=arguments.timing_cache,
            scoring=read_scoring_options(arguments),
        )
        version = build(options, bar.report)
    except BuildError as error:
        bar.close()
        return _fail(str(error))
    bar.close()
    print(f"built {arguments.repository / arguments.name}, version {version}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from deepseek_triton.builders.errors import BuildError
    from deepseek_triton.builders.fp8.quality_report import EvaluateOptions, evaluate
    from deepseek_triton.builders.fp8.recipe import recipe_named

    bar = _ProgressBar()
    try:
        options = EvaluateOptions(
            checkpoint=arguments.checkpoint,
            text=arguments.text,
            artefact=arguments.artefact,
            recipe=recipe_named(arguments.recipe),
            ranges=arguments.ranges,
            num_tokens=arguments.tokens,
            window_len=arguments.window,
        )
        result = evaluate(options, bar.report)
        bar.close()
        print(result.table())
        if arguments.output:
            result.save(arguments.output)
            print(f"wrote {arguments.output / 'quality.json'} and {arguments.output / 'quality.png'}")
    except BuildError as error:
        bar.close()
        return _fail(str(error))
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    from deepseek_triton.builders.commands.fit import run_fit, told
    from deepseek_triton.builders.errors import BuildError
    from deepseek_triton.clients.errors import ClientError
    from deepseek_triton.ensemble.server.tritonserver import ServerError

    bar = _ProgressBar()
    try:
        calibration, path = run_fit(arguments, bar.report)
    except (BuildError, ClientError, ServerError) as error:
        bar.close()
        return _fail(str(error))
    bar.close()
    print(f"{told(calibration)}\nwrote {path}; a running server reads it when it is started again")
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from deepseek_triton.builders.commands.scoring_arguments import split_labels
    from deepseek_triton.builders.commands.tune import conclusion, tune
    from deepseek_triton.builders.errors import BuildError
    from deepseek_triton.builders.tune.options import TuneOptions

    bar = _ProgressBar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how supervisors say Ctrl-C
    try:
        options = TuneOptions(
            name=arguments.model,
            repository=arguments.repository,
            p99_ms=arguments.p99_ms,
            clients=arguments.clients,
            seconds=arguments.seconds,
            rounds=arguments.rounds,
            budget_s=arguments.budget_s,
            texts=arguments.texts,
            labels=split_labels(arguments.labels),
            max_tokens=arguments.max_tokens,
            output=arguments.output,
            is_dry=arguments.dry_run,
        )
        tuned = tune(options, bar.report, bar.say)
    except BuildError as error:
        bar.close()
        return _fail(str(error))
    except KeyboardInterrupt:
        bar.close()
        print("interrupted; the same command goes on from the journal", file=sys.stderr)
        raise
    bar.close()
    print(tuned.table)
    if not tuned.is_complete:
        print("the budget is used up; the same command with more --budget-s goes on from the journal")
    for path in tuned.changed:
        print(f"wrote {path}")
    print(f"{conclusion(tuned)}; see {options.directory}")
    if not tuned.is_held:
        return _fail(f"nothing holds {options.p99_ms:g} ms for sure; raise --p99-ms, or lower --clients")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from deepseek_triton.builders.repository.check import check_repository

    problems = check_repository(arguments.repository)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{arguments.repository}: {len(problems)} problems" if problems else f"{arguments.repository}: sound")
    return 1 if problems else 0


def _serve(arguments: argparse.Namespace) -> int:
    from deepseek_triton.builders.errors import BuildError
    from deepseek_triton.builders.repository.check import built_models, is_scoring_model, require_sound, served_models
    from deepseek_triton.builders.tune.repository import finish_pending
    from deepseek_triton.clients.examples import examples, score_examples
    from deepseek_triton.ensemble.server.supervisor import supervise
    from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer

    repository: Path = arguments.repository

    def announce(server: TritonServer) -> None:
        for model in served_models(repository):
            ways = score_examples if is_scoring_model(repository, model) else examples
            for title, command in ways(model, server.http_url, server.grpc_url).items():
                print(f"\n# {title}\n{command}")
        print(f"\nmetrics: {server.metrics_url}\nCtrl-C stops the server", flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):  # SIGTERM is how supervisors say Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        for name in finish_pending(repository):
            print(f"{name}: finished writing the configuration that a killed `tune` had chosen", flush=True)
        require_sound(repository)
        built = built_models(repository)
        print(f"starting tritonserver on {repository}", flush=True)
        server = TritonServer(
            repository,
            host=arguments.host,
            http_port=arguments.http_port,
            grpc_port=arguments.grpc_port,
            metrics_port=arguments.metrics_port,
            log_file=arguments.log,
            # Triton would stop at a model of which there is only the configuration.
            models=built if len(built) < sum(path.is_dir() for path in repository.iterdir()) else (),
            progress=lambda name: print(f"ready: {name}", flush=True),
        )
        supervise(
            server, on_ready=announce, on_restart=lambda reason: print(f"{reason}; starting it again", flush=True)
        )
    except (BuildError, ServerError) as error:
        return _fail(str(error))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from deepseek_triton.loadtest.compare import run

    return run(arguments.a, arguments.b)


class _ProgressBar:
    """One bar on stderr for each thing that is done."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""

    def report(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what != self._what:
            self.close()
            is_bytes = what == "weights"
            self._bar = tqdm(
                total=total, desc=what, unit="B" if is_bytes else "", unit_scale=is_bytes, unit_divisor=1024
            )
            self._what = what
        self._bar.update(done - self._bar.n)

    def say(self, line: str) -> None:
        """A line above the bar."""
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
