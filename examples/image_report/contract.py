"""The tensors of the example's models, and the step graph of its ensemble.

    image ─► preprocessor ─► resnet ─► findings ─► TEXT-tokenizer ─► TEXT-engine ─► TEXT-detokenizer ─► report

The last three are those of a text model in the same repository: its weights are loaded once for both ensembles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepseek_triton.ensemble.protocol.contract import (
    DETOKENIZER,
    IMAGE,
    INPUT_IDS,
    MESSAGES,
    OPTIONS,
    OUTPUT_IDS,
    PROGRESS,
    PROMPT_INFO,
    STREAM,
    ModelContract,
    TensorSpec,
)
from deepseek_triton.ensemble.protocol.pipelines import DETOKENIZER_SUFFIX, ENGINE_SUFFIX, TOKENIZER_SUFFIX, model_name
from deepseek_triton.examples.image_report.findings import FINDINGS

TILE_SIZE = 128
PREPROCESSOR_SUFFIX = "preprocessor"
RESNET_SUFFIX = "resnet"
FINDINGS_SUFFIX = "findings"
IMPRESSION_PARAMETER = "impression"  # of the findings model's config.pbtxt: one of report.IMPRESSIONS

PIXELS = TensorSpec("pixels", "FP32", (3, TILE_SIZE, TILE_SIZE))  # RGB, 0 to 1
LOGITS = TensorSpec("logits", "FP32", (len(FINDINGS),))
GUIDE_TYPE = OPTIONS["guided_decoding_guide_type"]
GUIDE = OPTIONS["guided_decoding_guide"]
# What a client may say beside the image. The length is the schema's business: a report that is cut off is none.
CHOICES = tuple(
    OPTIONS[name]
    for name in ("temperature", "top_p", "seed", "repetition_penalty", "priority", "queue_timeout_ms", "timeout_ms")
)

PREPROCESSOR = ModelContract(inputs=(IMAGE,), outputs=(PIXELS,))
RESNET = ModelContract(inputs=(PIXELS,), outputs=(LOGITS,))
FINDER = ModelContract(inputs=(LOGITS,), outputs=(MESSAGES, GUIDE_TYPE, GUIDE))
REPORT = ModelContract(inputs=(IMAGE, *CHOICES, STREAM), outputs=DETOKENIZER.outputs)


@dataclass(frozen=True)
class Step:
    """One model of the ensemble; the maps go from the model's tensor name to the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def steps(name: str, text_model: str) -> tuple[Step, ...]:
    """The steps of ensemble `name`, whose reports `text_model` writes."""
    prompt, guide = _inner(MESSAGES), _inner(GUIDE_TYPE, GUIDE)
    ids, output = _inner(INPUT_IDS, PROMPT_INFO), _inner(OUTPUT_IDS, PROGRESS)
    return (
        Step(model_name(name, PREPROCESSOR_SUFFIX), _outer(IMAGE), _inner(PIXELS)),
        Step(model_name(name, RESNET_SUFFIX), _inner(PIXELS), _inner(LOGITS)),
        Step(model_name(name, FINDINGS_SUFFIX), _inner(LOGITS), {**prompt, **guide}),
        Step(model_name(text_model, TOKENIZER_SUFFIX), prompt, ids),
        Step(model_name(text_model, ENGINE_SUFFIX), {**ids, **guide, **_outer(*CHOICES, STREAM)}, output),
        Step(model_name(text_model, DETOKENIZER_SUFFIX), output, _outer(*DETOKENIZER.outputs)),
    )


def _outer(*tensors: TensorSpec) -> dict[str, str]:
    """Tensors that a client sends or receives."""
    return {tensor.name: tensor.name for tensor in tensors}


def _inner(*tensors: TensorSpec) -> dict[str, str]:
    """Tensors that only pass from step to step."""
    return {tensor.name: f"_{tensor.name}" for tensor in tensors}
