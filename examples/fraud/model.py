"""The fraud model that a server loads: numbers of a record and the language model's hidden state in, a decision out.

A linear head turns the hidden state into one number, the text's score. The trees see it beside the record's own
numbers; a scale and a bias, fitted on payments that the trees had not seen, make their log-odds calibrated.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.examples.fraud.drift import Reference
from deepseek_triton.examples.fraud.records import FEATURES, TEXT_FEATURE
from deepseek_triton.examples.fraud.trees import BoostedTrees, Floats

FILE_NAME = "fraud.json"
FORMAT = 1
LABELS = ("legitimate", "fraudulent")


class FraudModelError(ValueError):
    """fraud.json is missing, damaged or doesn't fit the language model; one line."""


@dataclass(frozen=True)
class Explanation:
    """Why one payment has its probability: `base` and the contributions, in log-odds, sum to `log_odds`.

    contributions: feature → what it adds, the largest first.
    """

    probability: float
    log_odds: float
    base: float
    contributions: dict[str, float]

    def to_json(self) -> str:
        """As a client gets it."""
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True)
class FraudModel:
    """head [hidden], head_bias: hidden state → text score. trees: of FEATURES and the text score.

    scale, bias: calibrated log-odds = scale * the trees' + bias. threshold: the probability from which a payment is
    called fraudulent. reference: of the training payments, for drift.
    """

    head: Floats
    head_bias: float
    trees: BoostedTrees
    scale: float
    bias: float
    threshold: float
    reference: Reference

    def inputs(self, features: NDArray[Any], hidden: NDArray[Any]) -> Floats:
        """features [n, FEATURES], hidden [n, hidden] → what the trees see [n, FEATURES + 1]."""
        if np.shape(hidden)[1] != len(self.head):
            raise FraudModelError(f"the hidden state has {np.shape(hidden)[1]} numbers, the head {len(self.head)}")
        text = np.asarray(hidden, np.float64) @ self.head + self.head_bias
        return np.column_stack([features, text])

    def log_odds(self, inputs: NDArray[Any]) -> Floats:
        """What `inputs` gave [n, FEATURES + 1] → calibrated log-odds [n]."""
        total: Floats = self.scale * self.trees.log_odds(inputs) + self.bias
        return total

    def probabilities(self, inputs: NDArray[Any]) -> Floats:
        """[n, FEATURES + 1] → the probability of each of LABELS [n, 2]."""
        fraud = 1 / (1 + np.exp(-self.log_odds(inputs)))
        return np.column_stack([1 - fraud, fraud])

    def explain(self, inputs: NDArray[Any]) -> list[Explanation]:
        """[n, FEATURES + 1] → one explanation each, whose log-odds are those of the decision."""
        added = self.scale * self.trees.contributions(inputs)
        base = self.scale * self.trees.base + self.bias
        found = []
        for row in added:
            total = float(base + row.sum())
            order = np.argsort(-abs(row))
            named = {(*FEATURES, TEXT_FEATURE)[i]: float(row[i]) for i in order}
            found.append(Explanation(1 / (1 + math.exp(-total)), total, base, named))
        return found

    def drift_values(self, inputs: NDArray[Any]) -> Floats:
        """[n, FEATURES + 1] → the columns of `reference`: the inputs, and the score last."""
        return np.column_stack([inputs, self.log_odds(inputs)])

    def save(self, directory: Path) -> None:
        """Write fraud.json into `directory`."""
        table = {
            "format": FORMAT,
            "head": self.head.tolist(),
            "head_bias": self.head_bias,
            "trees": self.trees.to_dict(),
            "scale": self.scale,
            "bias": self.bias,
            "threshold": self.threshold,
            "reference": dataclasses.asdict(self.reference),
        }
        (directory / FILE_NAME).write_text(json.dumps(table) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> FraudModel:
        """Read `directory`'s fraud.json.

        Raises:
            FraudModelError: it is missing, damaged or of another format.
        """
        path = directory / FILE_NAME
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            if table["format"] != FORMAT:
                raise FraudModelError(f"{path} has format {table['format']}, this version reads {FORMAT}: train again")
            numbers = {name: float(table[name]) for name in ("head_bias", "scale", "bias", "threshold")}
            return cls(
                head=np.array(table["head"], np.float64),
                trees=BoostedTrees.from_dict(table["trees"]),
                reference=Reference.from_dict(table["reference"]),
                **numbers,
            )
        except FraudModelError:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise FraudModelError(f"{path} can't be read: {error!r}; train again") from error
