"""Every tensor that crosses a model boundary: name, dtype, shape.

This is the leaf of the import graph: builders write these tables into `config.pbtxt`, the models read and
write these tensors, clients send and receive them. It knows nothing about Triton, tokens or engines.

Names and dtypes of public tensors are those of NVIDIA's `inflight_batcher_llm` ensemble, `finish_reason`
is vllm_backend's, so that clients written for either keep working; what neither has is this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

DType = Literal["BOOL", "INT32", "INT64", "UINT64", "FP32", "STRING"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor: its Triton dtype, its shape without the batch dimension (-1: any), if it may be absent."""

    name: str
    dtype: DType
    dims: tuple[int, ...] = (1,)
    optional: bool = False


def _option(name: str, dtype: DType, dims: tuple[int, ...] = (1,)) -> TensorSpec:
    return TensorSpec(name, dtype, dims, optional=True)


# Request: the prompt
TEXT_INPUT = _option("text_input", "STRING")
MESSAGES = _option("messages", "STRING")
ENABLE_THINKING = _option("enable_thinking", "BOOL")
SEPARATE_REASONING = _option("separate_reasoning", "BOOL")

# Request: how the answer is made
MAX_TOKENS = _option("max_tokens", "INT32")
MIN_TOKENS = _option("min_tokens", "INT32")
TEMPERATURE = _option("temperature", "FP32")
TOP_K = _option("top_k", "INT32")
TOP_P = _option("top_p", "FP32")
MIN_P = _option("min_p", "FP32")
SEED = _option("seed", "UINT64")
REPETITION_PENALTY = _option("repetition_penalty", "FP32")
PRESENCE_PENALTY = _option("presence_penalty", "FP32")
FREQUENCY_PENALTY = _option("frequency_penalty", "FP32")
STOP_WORDS = _option("stop_words", "STRING", (-1,))
BAD_WORDS = _option("bad_words", "STRING", (-1,))
END_ID = _option("end_id", "INT32")
PAD_ID = _option("pad_id", "INT32")  # taken for NVIDIA's clients' sake: nothing here is padded
NUM_RETURN_SEQUENCES = _option("num_return_sequences", "INT32")
GUIDE_TYPE = _option("guided_decoding_guide_type", "STRING")
GUIDE = _option("guided_decoding_guide", "STRING")
THINKING_TOKEN_BUDGET = _option("thinking_token_budget", "INT32")

# Request: what the answer holds
STREAM = _option("stream", "BOOL")
EXCLUDE_INPUT_IN_OUTPUT = _option("exclude_input_in_output", "BOOL")
RETURN_LOG_PROBS = _option("return_log_probs", "BOOL")
NUM_TOP_LOG_PROBS = _option("num_top_log_probs", "INT32")
RETURN_NUM_INPUT_TOKENS = _option("return_num_input_tokens", "BOOL")
RETURN_NUM_OUTPUT_TOKENS = _option("return_num_output_tokens", "BOOL")
RETURN_PERF_METRICS = _option("return_perf_metrics", "BOOL")

# Request: when it runs
PRIORITY = _option("priority", "INT32")
QUEUE_TIMEOUT_MS = _option("queue_timeout_ms", "INT32")
TIMEOUT_MS = _option("timeout_ms", "INT32")
# Sent to the engine alone, with the request id of the request to stop: ends that one.
STOP = _option("stop", "BOOL")

# Between the models
INPUT_IDS = _option("input_ids", "INT32", (-1,))
# What the detokenizer must know of the prompt (ensemble/protocol/progress.py), and that it follows and acknowledges
# each response (ensemble/processes/acknowledgements.py); absent in a direct call of the engine.
PROMPT_INFO = _option("prompt_info", "STRING")
OUTPUT_IDS = TensorSpec("output_ids", "INT32", (-1,))
PROGRESS = TensorSpec("progress", "STRING")

# Response: one value for each sequence that it tells of, but for the log probabilities, one for each new token.
TEXT_OUTPUT = TensorSpec("text_output", "STRING", (-1,))
REASONING_OUTPUT = TensorSpec("reasoning_output", "STRING", (-1,))
TOOL_CALLS = TensorSpec("tool_calls", "STRING", (-1,))
FINISH_REASON = TensorSpec("finish_reason", "STRING", (-1,))
SEQUENCE_INDEX = TensorSpec("sequence_index", "INT32", (-1,))
NUM_INPUT_TOKENS = TensorSpec("num_input_tokens", "INT32", (-1,))
NUM_OUTPUT_TOKENS = TensorSpec("num_output_tokens", "INT32", (-1,))
CUM_LOG_PROBS = TensorSpec("cum_log_probs", "FP32", (-1,))
OUTPUT_LOG_PROBS = TensorSpec("output_log_probs", "FP32", (-1,))
TOP_LOG_PROBS = TensorSpec("top_log_probs", "STRING", (-1,))
ARRIVAL_TIME_NS = TensorSpec("arrival_time_ns", "INT64", (-1,))
FIRST_SCHEDULED_TIME_NS = TensorSpec("first_scheduled_time_ns", "INT64", (-1,))
FIRST_TOKEN_TIME_NS = TensorSpec("first_token_time_ns", "INT64", (-1,))
LAST_TOKEN_TIME_NS = TensorSpec("last_token_time_ns", "INT64", (-1,))

# Scoring: what a client sends and gets. A batch's rows are texts; each has its own labels.
LABELS = TensorSpec("labels", "STRING", (-1,), optional=True)
LABEL = TensorSpec("label", "STRING")
SCORED_LABELS = TensorSpec("scored_labels", "STRING", (-1,))  # the request's labels, or the repository's own
PROBABILITIES = TensorSpec("probabilities", "FP32", (-1,))
LOG_PROBS = TensorSpec("log_probs", "FP32", (-1,))  # of each label as a continuation: the sum over its tokens
IS_CALIBRATED = TensorSpec("is_calibrated", "BOOL")

# Scoring: between the models (builders/graph/scoring.py says what they mean)
SCORE_IDS = TensorSpec("input_ids", "INT32", (-1,))
BRANCH_IDS = TensorSpec("branch_ids", "INT32", (-1,))
LOGIT_POSITIONS = TensorSpec("logit_positions", "INT32", (-1,))
TARGET_LOGITS = TensorSpec("target_logits", "INT32", (-1,))
TARGET_IDS = TensorSpec("target_ids", "INT32", (-1,))
TARGET_LABELS = TensorSpec("target_labels", "INT32", (-1,))  # which label each target is a token of; -1: padding
TOKEN_LOG_PROBS = TensorSpec("token_log_probs", "FP32", (-1,))
HIDDEN_STATE = TensorSpec("hidden_state", "FP32", (-1,))

PROMPT_INPUTS = (TEXT_INPUT, MESSAGES, ENABLE_THINKING, SEPARATE_REASONING)
ANSWER_INPUTS = (
    MAX_TOKENS, MIN_TOKENS, TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED,
    REPETITION_PENALTY, PRESENCE_PENALTY, FREQUENCY_PENALTY, STOP_WORDS, BAD_WORDS, END_ID, PAD_ID,
    NUM_RETURN_SEQUENCES, GUIDE_TYPE, GUIDE, THINKING_TOKEN_BUDGET,
    STREAM, EXCLUDE_INPUT_IN_OUTPUT, RETURN_LOG_PROBS, NUM_TOP_LOG_PROBS,
    RETURN_NUM_INPUT_TOKENS, RETURN_NUM_OUTPUT_TOKENS, RETURN_PERF_METRICS,
    PRIORITY, QUEUE_TIMEOUT_MS, TIMEOUT_MS,
)  # fmt: skip
ALWAYS_OUTPUTS = (TEXT_OUTPUT, FINISH_REASON, NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS)
# Given only where the request asks for them.
TIME_OUTPUTS = (ARRIVAL_TIME_NS, FIRST_SCHEDULED_TIME_NS, FIRST_TOKEN_TIME_NS, LAST_TOKEN_TIME_NS)
ASKED_OUTPUTS = (
    REASONING_OUTPUT, TOOL_CALLS, SEQUENCE_INDEX, CUM_LOG_PROBS, OUTPUT_LOG_PROBS, TOP_LOG_PROBS, *TIME_OUTPUTS,
)  # fmt: skip


@dataclass(frozen=True)
class ModelContract:
    """What one Triton model takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


TOKENIZER = ModelContract(inputs=PROMPT_INPUTS, outputs=(INPUT_IDS, PROMPT_INFO))
ENGINE = ModelContract(inputs=(INPUT_IDS, PROMPT_INFO, *ANSWER_INPUTS, STOP), outputs=(OUTPUT_IDS, PROGRESS))
DETOKENIZER = ModelContract(inputs=(OUTPUT_IDS, PROGRESS), outputs=(*ALWAYS_OUTPUTS, *ASKED_OUTPUTS))
GENERATE = ModelContract(inputs=(*PROMPT_INPUTS, *ANSWER_INPUTS), outputs=DETOKENIZER.outputs)

SCORE_ROW = (SCORE_IDS, BRANCH_IDS, LOGIT_POSITIONS, TARGET_LOGITS, TARGET_IDS)
SCORE_RESULTS = (LABEL, PROBABILITIES, LOG_PROBS, IS_CALIBRATED)
SCORE_TOKENIZER = ModelContract(
    inputs=(TEXT_INPUT, MESSAGES, LABELS), outputs=(*SCORE_ROW, TARGET_LABELS, SCORED_LABELS, NUM_INPUT_TOKENS)
)
SCORE_ENGINE = ModelContract(inputs=SCORE_ROW, outputs=(TOKEN_LOG_PROBS, HIDDEN_STATE))
SCORER = ModelContract(inputs=(TOKEN_LOG_PROBS, HIDDEN_STATE, TARGET_LABELS, SCORED_LABELS), outputs=SCORE_RESULTS)
SCORE = ModelContract(inputs=(TEXT_INPUT, MESSAGES, LABELS), outputs=(*SCORE_RESULTS, SCORED_LABELS, NUM_INPUT_TOKENS))
