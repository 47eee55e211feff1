"""A request's tensors → what they ask of the engine.

A table from tensor to field, and the few options that are more than a value. It translates and converts; ranges are
checked where the fields live.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.admission import RequestOptions
from deepseek_triton.ensemble.models.tensors import RequestError, scalar
from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec
from deepseek_triton.ensemble.protocol.progress import PromptInfo
from deepseek_triton.ensemble.sampling import SamplingParams
from deepseek_triton.ensemble.sampling.params import MAX_LOG_PROBS
from deepseek_triton.ensemble.text.errors import utf8_text

PARAMS: dict[str, TensorSpec] = {
    "max_tokens": contract.MAX_TOKENS,
    "min_tokens": contract.MIN_TOKENS,
    "temperature": contract.TEMPERATURE,
    "top_k": contract.TOP_K,
    "top_p": contract.TOP_P,
    "min_p": contract.MIN_P,
    "seed": contract.SEED,
    "repetition_penalty": contract.REPETITION_PENALTY,
    "presence_penalty": contract.PRESENCE_PENALTY,
    "frequency_penalty": contract.FREQUENCY_PENALTY,
    "end_id": contract.END_ID,
    "num_return_sequences": contract.NUM_RETURN_SEQUENCES,
}
OPTIONS: dict[str, TensorSpec] = {
    "thinking_token_budget": contract.THINKING_TOKEN_BUDGET,
    "is_streamed": contract.STREAM,
    "returns_times": contract.RETURN_PERF_METRICS,
    "returns_input_count": contract.RETURN_NUM_INPUT_TOKENS,
    "returns_output_count": contract.RETURN_NUM_OUTPUT_TOKENS,
    "priority": contract.PRIORITY,
    "queue_timeout_ms": contract.QUEUE_TIMEOUT_MS,
    "timeout_ms": contract.TIMEOUT_MS,
}


def read_options(inputs: dict[str, NDArray[Any]]) -> RequestOptions:
    """What the request's tensors, name → array, ask for.

    Raises:
        RequestError, ValueError: one has the wrong shape or a value out of range.
    """
    params = {name: value for name, spec in PARAMS.items() if (value := scalar(inputs, spec)) is not None}
    options = {name: value for name, spec in OPTIONS.items() if (value := scalar(inputs, spec)) is not None}
    info = _text(inputs, contract.PROMPT_INFO)
    return RequestOptions(
        params=SamplingParams(**params, num_log_probs=_num_log_probs(inputs)),
        prompt_info=None if info is None else PromptInfo.from_json(info),
        stop_words=_texts(inputs, contract.STOP_WORDS),
        bad_words=_texts(inputs, contract.BAD_WORDS),
        guide_type=_text(inputs, contract.GUIDE_TYPE) or None,
        guide=_text(inputs, contract.GUIDE) or None,  # as the type: NVIDIA's clients send empty texts for none
        echoes_prompt=scalar(inputs, contract.EXCLUDE_INPUT_IN_OUTPUT) is False,
        **options,
    )


def _num_log_probs(inputs: dict[str, NDArray[Any]]) -> int | None:
    """How many likeliest tokens to report; 0: the chosen one alone, None: none at all."""
    num_top = scalar(inputs, contract.NUM_TOP_LOG_PROBS) or 0
    if not 0 <= num_top <= MAX_LOG_PROBS:
        raise RequestError(f"{contract.NUM_TOP_LOG_PROBS.name} is {num_top}, must be 0 to {MAX_LOG_PROBS}")
    return num_top if num_top or scalar(inputs, contract.RETURN_LOG_PROBS) else None


def _text(inputs: dict[str, NDArray[Any]], spec: TensorSpec) -> str | None:
    value = scalar(inputs, spec)
    return None if value is None else utf8_text(value, spec.name)


def _texts(inputs: dict[str, NDArray[Any]], spec: TensorSpec) -> tuple[str, ...]:
    """All values of a text tensor. NVIDIA's clients send one empty text for none."""
    if spec.name not in inputs:
        return ()
    texts = tuple(utf8_text(value, spec.name) for value in inputs[spec.name].reshape(-1))
    if len(texts) > 1 and "" in texts:
        raise RequestError(f"{spec.name} holds an empty text; leave it out")
    return () if texts == ("",) else texts
