"""The ensembles' step graphs, as data.

A pipeline lists an ensemble's models in order and maps their tensors to the ensemble's. Builders write it into the
ensemble's config.pbtxt. This module knows tensors and names, nothing of Triton's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deepseek_triton.ensemble.protocol.contract import (
    ANSWER_INPUTS,
    COMPATIBLE_INPUTS,
    DETOKENIZER,
    EMBEDDING,
    ENGINE,
    ENSEMBLE,
    HIDDEN_STATE,
    INPUT_IDS,
    LABELS,
    MESSAGES,
    NUM_INPUT_TOKENS,
    OUTPUT_IDS,
    PROGRESS,
    PROMPT_INFO,
    PROMPT_INPUTS,
    SCORE,
    SCORE_AND_EMBED,
    SCORE_ENGINE,
    SCORE_RESULTS,
    SCORE_ROW,
    SCORE_TOKENIZER,
    SCORED_LABELS,
    SCORER,
    TARGET_LABELS,
    TEXT_INPUT,
    TOKEN_LOG_PROBS,
    TOKENIZER,
    ModelContract,
    TensorSpec,
)

TOKENIZER_SUFFIX = "tokenizer"
ENGINE_SUFFIX = "engine"
DETOKENIZER_SUFFIX = "detokenizer"
SCORER_SUFFIX = "scorer"
INFER_SUFFIX = "infer"  # beside an ensemble that generates text, where the build was asked for it
VLLM_SUFFIX = "vllm"  # of target vllm: the model of Triton's vLLM backend, which the engine asks
BESIDE_SUFFIXES = (VLLM_SUFFIX, INFER_SUFFIX)  # models that are no step of the ensemble
PART_SUFFIXES = (TOKENIZER_SUFFIX, ENGINE_SUFFIX, DETOKENIZER_SUFFIX, SCORER_SUFFIX, *BESIDE_SUFFIXES)


@dataclass(frozen=True)
class EnsembleStep:
    """One model of a pipeline; the maps go from the model's tensor name to the ensemble's."""

    model_suffix: str
    contract: ModelContract
    input_map: Mapping[str, str]
    output_map: Mapping[str, str]


@dataclass(frozen=True)
class EnsemblePipeline:
    """An ensemble: its inputs and outputs, and the models that it runs."""

    name: str
    contract: ModelContract
    steps: tuple[EnsembleStep, ...]


def model_name(served_name: str, suffix: str) -> str:
    """The name of one model of an ensemble: ("smollm2", "engine") → "smollm2-engine"."""
    return f"{served_name}-{suffix}"


def _public(*tensors: TensorSpec) -> dict[str, str]:
    """Tensors that a client sends or receives: the same name on both sides."""
    return {tensor.name: tensor.name for tensor in tensors}


def _private(*tensors: TensorSpec) -> dict[str, str]:
    """Tensors that only pass from step to step; an underscore keeps their names apart from the public ones."""
    return {tensor.name: f"_{tensor.name}" for tensor in tensors}


# Everything the detokenizer takes comes from the engine: Triton (server issue 7275) refuses an ensemble in
# which a step after a decoupled one also takes a tensor from before it.
_TOKENIZED = _private(INPUT_IDS, PROMPT_INFO)
_GENERATED = _private(OUTPUT_IDS, PROGRESS)

GENERATE_PIPELINE = EnsemblePipeline(
    "generate",
    ENSEMBLE,
    (
        EnsembleStep(TOKENIZER_SUFFIX, TOKENIZER, _public(*PROMPT_INPUTS), _TOKENIZED),
        EnsembleStep(ENGINE_SUFFIX, ENGINE, {**_TOKENIZED, **_public(*ANSWER_INPUTS, *COMPATIBLE_INPUTS)}, _GENERATED),
        EnsembleStep(DETOKENIZER_SUFFIX, DETOKENIZER, _GENERATED, _public(*DETOKENIZER.outputs)),
    ),
)

_ROWS = _private(*SCORE_ROW, TARGET_LABELS)
_LABELS = _public(SCORED_LABELS)


def score_pipeline(*, embeds: bool) -> EnsemblePipeline:
    """The ensemble that scores; with `embeds` it also gives the hidden state at each prompt's end, as `EMBEDDING`."""
    hidden = {HIDDEN_STATE.name: EMBEDDING.name} if embeds else _private(HIDDEN_STATE)
    scored = {**_private(TOKEN_LOG_PROBS), **hidden}
    # No model here is decoupled, so the scorer may take tensors of the tokenizer.
    return EnsemblePipeline(
        "score",
        SCORE_AND_EMBED if embeds else SCORE,
        (
            EnsembleStep(
                TOKENIZER_SUFFIX,
                SCORE_TOKENIZER,
                _public(TEXT_INPUT, MESSAGES, LABELS),
                {**_ROWS, **_LABELS, **_public(NUM_INPUT_TOKENS)},
            ),
            EnsembleStep(ENGINE_SUFFIX, SCORE_ENGINE, _private(*SCORE_ROW), scored),
            EnsembleStep(
                SCORER_SUFFIX, SCORER, {**scored, **_private(TARGET_LABELS), **_LABELS}, _public(*SCORE_RESULTS)
            ),
        ),
    )
