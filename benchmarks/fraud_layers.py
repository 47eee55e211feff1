"""The fraud example with the language model's first layers alone: how good are its decisions for so many layers?

Every payment's text goes once through all layers, in float32. The state after each number of layers goes through the
last norm; a head and trees are fitted on it as the example does it, and judge held-out payments. Judges without a
language model stand beside.
    python -m benchmarks.fraud_layers --states DIR [--seconds 280] [--train 4000] [--test 3000]
keeps the states in DIR and ends after some seconds; run it again until it writes benchmarks/results/fraud-layers.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe
from benchmarks.weights import smollm2
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.fp8.texts.calibration_text import load_tokenizer
from deepseek_triton.builders.lifecycle.recovery.models import load_model
from deepseek_triton.examples.fraud.__main__ import SEED, SETS
from deepseek_triton.examples.fraud.data.payments import LabelledPayment, make_payments
from deepseek_triton.examples.fraud.evaluation import Baselines, evaluate
from deepseek_triton.examples.fraud.serving.repository import TEMPLATE
from deepseek_triton.examples.fraud.training import features_of, train, truth_of

RESULT = Path(__file__).parent / "results" / "fraud-layers.json"
LAYERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30)
PART = 500  # payments of a file of states
ROWS = 32  # texts computed at once
OURS = "language model"
BESIDE = ("logistic regression, fields", "gradient boosting, fields and bag of words")
NUM_RESAMPLES = 100
States = NDArray[Any]


class Reader:
    """The states after each of LAYERS of texts, by torch."""

    def __init__(self) -> None:
        checkpoint = open_checkpoint(smollm2())
        self._tokenizer = load_tokenizer(checkpoint)
        self._model: Any = load_model(checkpoint, "cpu").eval()

    def states(self, payments: Sequence[LabelledPayment]) -> dict[str, States]:
        """ "l4" → [payments, hidden_size] float16, after four layers and the last norm."""
        import torch

        ids = [self._tokenizer.encode(TEMPLATE.format(text=payment.record.text())) for payment in payments]
        found = {f"l{n}": np.zeros((len(ids), self._model.config.hidden_size), np.float16) for n in LAYERS}
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        for at in range(0, len(order), ROWS):
            own = order[at : at + ROWS]
            tokens = torch.zeros(len(own), max(len(ids[number]) for number in own), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, number in enumerate(own):
                tokens[row, : len(ids[number])] = torch.tensor(list(ids[number]))
                mask[row, : len(ids[number])] = 1
            last = (torch.arange(len(own)), mask.sum(1) - 1)
            with torch.no_grad():
                output = self._model.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
                for n in LAYERS:
                    state = output.hidden_states[n][last]
                    is_normed = n == self._model.config.num_hidden_layers
                    found[f"l{n}"][own] = (state if is_normed else self._model.model.norm(state)).numpy()
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compute the states that are missing; when none is, judge, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--states", type=Path, required=True, help="where the states are kept")
    parser.add_argument("--seconds", type=float, default=280, help="end after so long, between two files of states")
    parser.add_argument("--train", type=int, default=4000, help="training payments")
    parser.add_argument("--test", type=int, default=3000, help="held-out payments of each set")
    arguments = parser.parse_args(argv)
    end = time.monotonic() + arguments.seconds
    sets = {"train": make_payments(arguments.train, SEED)}
    for number, (name, new_words) in enumerate(SETS.items()):
        sets[name] = make_payments(arguments.test, SEED + 1 + number, new_words=new_words)
    if not _compute(sets, arguments.states, end):
        print("run it again: there are more states to compute")
        return 0
    training = sets.pop("train")
    baselines = Baselines(training)
    beside = {name: {k: v for k, v in baselines.log_odds(own).items() if k in BESIDE} for name, own in sets.items()}
    result: dict[str, Any] = {
        "machine": describe(),
        "payments": {"train": arguments.train, "test, each set": arguments.test, "seed": SEED},
        "figure": "PR-AUC: value, low and high of the 95 % interval",
        "layers": {},
    }
    for n in LAYERS:
        model = train(training, _states(arguments.states, "train", n))
        of_layers: dict[str, Any] = {}
        for name, payments in sets.items():
            log_odds = model.log_odds(model.inputs(features_of(payments), _states(arguments.states, name, n)))
            judges = {**beside[name], OURS: log_odds}
            figures, gains = evaluate(judges, truth_of(payments), OURS, NUM_RESAMPLES)
            of_layers[name] = {OURS: _rounded(figures[OURS]["pr_auc"])} | {
                f"gain over {judge}": _rounded(own["pr_auc"]) for judge, own in gains.items()
            }
        result["layers"][str(n)] = of_layers
        print(n, {name: own[OURS] for name, own in of_layers.items()}, flush=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _compute(sets: dict[str, list[LabelledPayment]], directory: Path, end: float) -> bool:
    """Compute the states that aren't kept yet; whether all are there."""
    directory.mkdir(parents=True, exist_ok=True)
    reader = None
    for name, payments in sets.items():
        for start in range(0, len(payments), PART):
            path = _path(directory, name, start)
            if path.exists():
                continue
            if time.monotonic() > end:
                return False
            reader = reader or Reader()
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **reader.states(payments[start : start + PART]))
            partial.rename(path)
    return True


def _path(directory: Path, name: str, start: int) -> Path:
    return directory / f"{name.replace(' ', '_')}-{start}.npz"


def _states(directory: Path, name: str, layers: int) -> States:
    """[payments, hidden_size] float32 of one set."""
    paths = sorted(directory.glob(f"{name.replace(' ', '_')}-*.npz"), key=lambda path: int(path.stem.rsplit("-")[-1]))
    return np.concatenate([np.load(path)[f"l{layers}"].astype(np.float32) for path in paths])


def _rounded(interval: Any) -> list[float]:
    """Value, low and high."""
    return [round(value, 3) for value in (interval.value, interval.low, interval.high)]


if __name__ == "__main__":
    sys.exit(main())
