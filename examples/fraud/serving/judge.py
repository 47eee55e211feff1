"""What the three models after the language model share: fraud.json, and the inputs of a batch as one array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.models.tensors import read_inputs
from deepseek_triton.ensemble.protocol.contract import HIDDEN_STATE
from deepseek_triton.examples.fraud.model import FraudModel
from deepseek_triton.examples.fraud.serving.contracts import NUMBERS


def load_model(args: dict[str, str]) -> FraudModel:
    """The model that lies beside the adapter's model.py."""
    return FraudModel.load(Path(args["model_repository"]) / args["model_version"])


def tree_inputs(model: FraudModel, requests: list[Any]) -> list[NDArray[Any]]:
    """What the trees see of each request [records, inputs]; computed for all requests at once."""
    tensors = [read_inputs(request) for request in requests]
    numbers = [each[NUMBERS.name] for each in tensors]
    hidden = np.concatenate([each[HIDDEN_STATE.name] for each in tensors])
    inputs = model.inputs(np.concatenate(numbers), hidden)
    return np.split(inputs, np.cumsum([len(each) for each in numbers])[:-1])
