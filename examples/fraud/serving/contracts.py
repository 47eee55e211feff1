"""The tensors of the fraud models, and the ensemble that joins them.

    record ─► preprocess ─┬─ text ─► text-tokenizer ─► text-engine ─┬─► decision      label, probabilities
                          │         (batches of up to 16)           ├─► explanation   contributions
                          └─ numbers ───────────────────────────────┴─► drift         PSI, metrics

The last three take nothing of each other: Triton runs them at the same time. The ensemble takes and gives what every
scoring model does, so that `deepseek-triton score`, the gateway and load tests call it as they call those.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import ModelContract
from deepseek_triton.ensemble.protocol.pipelines import (
    ENGINE_SUFFIX,
    TOKENIZER_SUFFIX,
    EnsemblePipeline,
    EnsembleStep,
)
from deepseek_triton.ensemble.protocol.tensor_spec import DType, TensorSpec
from deepseek_triton.examples.fraud.records import FEATURES, PaymentRecord

NAME = "fraud"
TEXT_SUFFIX = "text"  # fraud-text is the scoring model that `deepseek-triton build` makes
MAX_BATCH_SIZE = 16

# A record as JSON in `text_input`, or each of its fields as a tensor.
RECORD = TensorSpec(contract.TEXT_INPUT.name, "STRING", optional=True)
DTYPES: dict[str, DType] = {"float": "FP32", "int": "INT32", "bool": "BOOL", "str": "STRING"}
FIELDS = tuple(
    TensorSpec(field.name, DTYPES[str(field.type)], optional=True) for field in dataclasses.fields(PaymentRecord)
)
TEXT = TensorSpec("text", "STRING")
NUMBERS = TensorSpec("numbers", "FP32", (len(FEATURES),))
EXPLANATION = TensorSpec("explanation", "STRING")  # JSON of model.Explanation
DRIFT = TensorSpec("drift", "FP32")  # the largest PSI of the latest payments

RESULTS = (*contract.SCORE_RESULTS, contract.SCORED_LABELS)
PREPROCESS = ModelContract(inputs=(RECORD, *FIELDS), outputs=(TEXT, NUMBERS))


def judged(hidden_size: int, *outputs: TensorSpec) -> ModelContract:
    """A model that takes a record's numbers and its text's hidden state."""
    hidden = dataclasses.replace(contract.HIDDEN_STATE, dims=(hidden_size,))
    return ModelContract(inputs=(NUMBERS, hidden), outputs=outputs)


def judges(hidden_size: int) -> dict[str, ModelContract]:
    """The models after the language model: suffix → contract."""
    return {
        "decision": judged(hidden_size, *RESULTS),
        "explanation": judged(hidden_size, EXPLANATION),
        "drift": judged(hidden_size, DRIFT),
    }


def pipeline(hidden_size: int) -> EnsemblePipeline:
    """The ensemble `fraud`."""
    rows = _private(*contract.SCORE_ROW)
    numbers, hidden = _private(NUMBERS), _private(contract.HIDDEN_STATE)
    text_part = f"{TEXT_SUFFIX}-{{}}".format
    steps = (
        EnsembleStep("preprocess", PREPROCESS, _public(*PREPROCESS.inputs), _private(*PREPROCESS.outputs)),
        EnsembleStep(
            text_part(TOKENIZER_SUFFIX),
            contract.SCORE_TOKENIZER,
            {contract.TEXT_INPUT.name: f"_{TEXT.name}"},
            {**rows, **_public(contract.NUM_INPUT_TOKENS)},
        ),
        EnsembleStep(text_part(ENGINE_SUFFIX), contract.SCORE_ENGINE, rows, hidden),
        *(
            EnsembleStep(suffix, own, {**numbers, **hidden}, _public(*own.outputs))
            for suffix, own in judges(hidden_size).items()
        ),
    )
    outputs = (*RESULTS, contract.NUM_INPUT_TOKENS, EXPLANATION, DRIFT)
    return EnsemblePipeline(NAME, ModelContract(PREPROCESS.inputs, outputs), steps)


def _public(*tensors: TensorSpec) -> dict[str, str]:
    return {tensor.name: tensor.name for tensor in tensors}


def _private(*tensors: TensorSpec) -> dict[str, str]:
    return {tensor.name: f"_{tensor.name}" for tensor in tensors}


def record_from(values: dict[str, Any]) -> PaymentRecord:
    """One row's tensors, name → value, as a record.

    Raises:
        RecordError, ValueError: neither JSON alone nor every field, or a value out of its range.
    """
    if RECORD.name in values:
        if len(values) > 1:
            raise ValueError(f"give the record as {RECORD.name} or as one tensor for each field, not both")
        return PaymentRecord.from_json(values[RECORD.name])
    for spec in FIELDS:
        if spec.name not in values:
            raise ValueError(f"{spec.name} is missing: give {RECORD.name}, JSON, or every field")
    plain: dict[str, Any] = {
        name: value.decode() if isinstance(value, bytes) else value.item() for name, value in values.items()
    }
    return PaymentRecord(**plain)
