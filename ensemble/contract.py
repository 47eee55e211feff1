"""Every tensor that crosses a model boundary: name, dtype, shape.

This is the leaf of the import graph: builders write these tables into `config.pbtxt`, the models read and
write these tensors, clients send and receive them. It knows nothing about Triton, tokens or engines.

Names and dtypes of public tensors are those of NVIDIA's `inflight_batcher_llm` ensemble, `finish_reason`
is vllm_backend's, so that clients written for either keep working; `messages` is this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DType = Literal["BOOL", "INT32", "INT64", "UINT64", "FP32", "STRING"]
FinishReason = Literal["stop", "length", "cancelled"]
FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor: its Triton dtype, its shape without the batch dimension (-1: any), if it may be absent."""

    name: str
    dtype: DType
    dims: tuple[int, ...] = (1,)
    optional: bool = False


# Request
TEXT_INPUT = TensorSpec("text_input", "STRING", optional=True)
MESSAGES = TensorSpec("messages", "STRING", optional=True)
STREAM = TensorSpec("stream", "BOOL", optional=True)
MAX_TOKENS = TensorSpec("max_tokens", "INT32", optional=True)
TEMPERATURE = TensorSpec("temperature", "FP32", optional=True)
TOP_K = TensorSpec("top_k", "INT32", optional=True)
TOP_P = TensorSpec("top_p", "FP32", optional=True)
SEED = TensorSpec("seed", "UINT64", optional=True)
# Sent to the engine alone, with the request id of the request to stop: ends that one.
STOP = TensorSpec("stop", "BOOL", optional=True)

# Between the models
INPUT_IDS = TensorSpec("input_ids", "INT32", (-1,), optional=True)
OUTPUT_IDS = TensorSpec("output_ids", "INT32", (-1,))
SEQUENCE_ID = TensorSpec("sequence_id", "UINT64")
# True where a detokenizer follows and acknowledges each response (ensemble/acknowledge.py); absent in a direct call.
ACKNOWLEDGE = TensorSpec("acknowledge", "BOOL", optional=True)

# Response
TEXT_OUTPUT = TensorSpec("text_output", "STRING")
FINISH_REASON = TensorSpec("finish_reason", "STRING")
NUM_INPUT_TOKENS = TensorSpec("num_input_tokens", "INT32")
NUM_OUTPUT_TOKENS = TensorSpec("num_output_tokens", "INT32")

# Scoring: what a client sends and gets. A batch's rows are texts; each has its own labels.
LABELS = TensorSpec("labels", "STRING", (-1,), optional=True)
LABEL = TensorSpec("label", "STRING")
SCORED_LABELS = TensorSpec("scored_labels", "STRING", (-1,))  # the request's labels, or the repository's own
PROBABILITIES = TensorSpec("probabilities", "FP32", (-1,))
LOG_PROBS = TensorSpec("log_probs", "FP32", (-1,))  # of each label as a continuation: the sum over its tokens
IS_CALIBRATED = TensorSpec("is_calibrated", "BOOL")

# Scoring: between the models (builders/engine/stateless.py says what they mean)
SCORE_IDS = TensorSpec("input_ids", "INT32", (-1,))
BRANCH_IDS = TensorSpec("branch_ids", "INT32", (-1,))
LOGIT_POSITIONS = TensorSpec("logit_positions", "INT32", (-1,))
TARGET_LOGITS = TensorSpec("target_logits", "INT32", (-1,))
TARGET_IDS = TensorSpec("target_ids", "INT32", (-1,))
TARGET_LABELS = TensorSpec("target_labels", "INT32", (-1,))  # which label each target is a token of; -1: padding
TOKEN_LOG_PROBS = TensorSpec("token_log_probs", "FP32", (-1,))
HIDDEN_STATE = TensorSpec("hidden_state", "FP32", (-1,))

SAMPLING_INPUTS = (STREAM, MAX_TOKENS, TEMPERATURE, TOP_K, TOP_P, SEED)
PROGRESS_OUTPUTS = (FINISH_REASON, NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS)


@dataclass(frozen=True)
class ModelContract:
    """What one Triton model takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


TOKENIZER = ModelContract(inputs=(TEXT_INPUT, MESSAGES), outputs=(INPUT_IDS, ACKNOWLEDGE))
ENGINE = ModelContract(
    inputs=(INPUT_IDS, ACKNOWLEDGE, *SAMPLING_INPUTS, STOP),
    outputs=(OUTPUT_IDS, SEQUENCE_ID, *PROGRESS_OUTPUTS),
)
DETOKENIZER = ModelContract(
    inputs=(OUTPUT_IDS, SEQUENCE_ID, *PROGRESS_OUTPUTS), outputs=(TEXT_OUTPUT, *PROGRESS_OUTPUTS)
)
GENERATE = ModelContract(inputs=(TEXT_INPUT, MESSAGES, *SAMPLING_INPUTS), outputs=(TEXT_OUTPUT, *PROGRESS_OUTPUTS))

SCORE_ROW = (SCORE_IDS, BRANCH_IDS, LOGIT_POSITIONS, TARGET_LOGITS, TARGET_IDS)
SCORE_RESULTS = (LABEL, PROBABILITIES, LOG_PROBS, IS_CALIBRATED)
SCORE_TOKENIZER = ModelContract(
    inputs=(TEXT_INPUT, MESSAGES, LABELS), outputs=(*SCORE_ROW, TARGET_LABELS, SCORED_LABELS, NUM_INPUT_TOKENS)
)
SCORE_ENGINE = ModelContract(inputs=SCORE_ROW, outputs=(TOKEN_LOG_PROBS, HIDDEN_STATE))
SCORER = ModelContract(inputs=(TOKEN_LOG_PROBS, HIDDEN_STATE, TARGET_LABELS, SCORED_LABELS), outputs=SCORE_RESULTS)
SCORE = ModelContract(inputs=(TEXT_INPUT, MESSAGES, LABELS), outputs=(*SCORE_RESULTS, SCORED_LABELS, NUM_INPUT_TOKENS))
