"""The tensors that each Triton model takes and gives: name, dtype, shape.

Builders write these tables into `config.pbtxt`, the models read and write these tensors, clients send and receive them.
What a request can say is `request_options.py`'s table. This module knows nothing about Triton, tokens or engines.

Names and dtypes of public tensors are those of NVIDIA's `inflight_batcher_llm` ensemble; `finish_reason` is
vllm_backend's. What neither has is this project's own. What only their clients send is `compatible_options.py`'s table;
docs/migrating.md says which clients were run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from deepseek_triton.ensemble.protocol.compatible_options import COMPATIBLE_OPTIONS
from deepseek_triton.ensemble.protocol.request_options import REQUEST_OPTIONS
from deepseek_triton.ensemble.protocol.tensor_spec import DType as DType
from deepseek_triton.ensemble.protocol.tensor_spec import TensorSpec as TensorSpec

FinishReason = Literal["stop", "length", "cancelled", "error"]
FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)

# Request: the options, and by name those that the code refers to.
PROMPT_INPUTS = tuple(option.tensor for option in REQUEST_OPTIONS if option.group == "prompt")
ANSWER_INPUTS = tuple(option.tensor for option in REQUEST_OPTIONS if option.group != "prompt")
OPTIONS: dict[str, TensorSpec] = {tensor.name: tensor for tensor in (*PROMPT_INPUTS, *ANSWER_INPUTS)}
TEXT_INPUT = OPTIONS["text_input"]
MESSAGES = OPTIONS["messages"]
ENABLE_THINKING = OPTIONS["enable_thinking"]
SEPARATE_REASONING = OPTIONS["separate_reasoning"]
STREAM = OPTIONS["stream"]
# The bytes of one image file, of an ensemble that writes a report on it (examples/image_report).
IMAGE = TensorSpec("image", "STRING")

# What only the clients of other ensembles send.
COMPATIBLE_INPUTS = tuple(option.tensor for option in COMPATIBLE_OPTIONS)

# Sent to the engine alone, with the request id of the request to stop: ends that one.
STOP = TensorSpec("stop", "BOOL", optional=True)
# Sent to the engine alone: it answers with what it serves, here the tokens that a prompt and its answer may have.
DESCRIBE = TensorSpec("describe", "BOOL", optional=True)
MAX_SEQ_LEN = TensorSpec("max_seq_len", "INT32")
# A parameter of a request to a tokenizer, which answers in its output of texts with the identity of its build.
DESCRIBE_BUILD = "describe_build"
# The request parameter of the request and of the one that stops it: only who knows the key may stop it. A request
# without a key can be stopped if its id is a random one of 32 hexadecimal digits, which nobody guesses.
STOP_KEY = "stop_key"

# The end of every error, and of no other, that says that there is no room now.
RETRY = "; retry later"

# Between the models
INPUT_IDS = TensorSpec("input_ids", "INT32", (-1,), optional=True)
# What the detokenizer must know of the prompt (ensemble/protocol/progress.py), and that it follows and acknowledges
# each response (ensemble/processes/acknowledgements.py); absent in a direct call of the engine.
PROMPT_INFO = TensorSpec("prompt_info", "STRING", optional=True)
OUTPUT_IDS = TensorSpec("output_ids", "INT32", (-1,))
PROGRESS = TensorSpec("progress", "STRING")

# Response: one value for each sequence that it reports on; of the log probabilities, one for each new token.
TEXT_OUTPUT = TensorSpec("text_output", "STRING", (-1,))
REASONING_OUTPUT = TensorSpec("reasoning_output", "STRING", (-1,))
TOOL_CALLS = TensorSpec("tool_calls", "STRING", (-1,))
FINISH_REASON = TensorSpec("finish_reason", "STRING", (-1,))
SEQUENCE_INDEX = TensorSpec("sequence_index", "INT32", (-1,))
BATCH_INDEX = TensorSpec("batch_index", "INT32", (-1,))
NUM_INPUT_TOKENS = TensorSpec("num_input_tokens", "INT32", (-1,))
NUM_OUTPUT_TOKENS = TensorSpec("num_output_tokens", "INT32", (-1,))
# Of the prompt's tokens, those found in a cache; of the new ones, those of the reasoning. They come with a sequence's
# first response and its last, and only to a client that sends STOP_KEY, as this project's do; so does OUTPUT_TOKENS.
NUM_CACHED_TOKENS = TensorSpec("num_cached_tokens", "INT32", (-1,))
NUM_REASONING_TOKENS = TensorSpec("num_reasoning_tokens", "INT32", (-1,))
CUM_LOG_PROBS = TensorSpec("cum_log_probs", "FP32", (-1,))
OUTPUT_LOG_PROBS = TensorSpec("output_log_probs", "FP32", (-1, -1))
OUTPUT_TOKENS = TensorSpec("output_tokens", "STRING", (-1,))  # beside the log probabilities: each new token
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
EMBEDDING = TensorSpec("embedding", "FP32", (-1,))  # where the build was asked for it: `HIDDEN_STATE`

# Scoring: between the models (builders/graph/forms/scoring.py says what they mean)
SCORE_IDS = TensorSpec("input_ids", "INT32", (-1,))
BRANCH_IDS = TensorSpec("branch_ids", "INT32", (-1,))
LOGIT_POSITIONS = TensorSpec("logit_positions", "INT32", (-1,))
TARGET_LOGITS = TensorSpec("target_logits", "INT32", (-1,))
TARGET_IDS = TensorSpec("target_ids", "INT32", (-1,))
TARGET_LABELS = TensorSpec("target_labels", "INT32", (-1,))  # which label each target is a token of; -1: padding
TOKEN_LOG_PROBS = TensorSpec("token_log_probs", "FP32", (-1,))
HIDDEN_STATE = TensorSpec("hidden_state", "FP32", (-1,))

ALWAYS_OUTPUTS = (TEXT_OUTPUT, FINISH_REASON, NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS)
# Given only where the request asks for them.
TIME_OUTPUTS = (ARRIVAL_TIME_NS, FIRST_SCHEDULED_TIME_NS, FIRST_TOKEN_TIME_NS, LAST_TOKEN_TIME_NS)
ASKED_OUTPUTS = (
    REASONING_OUTPUT, TOOL_CALLS, SEQUENCE_INDEX, BATCH_INDEX, NUM_CACHED_TOKENS, NUM_REASONING_TOKENS,
    CUM_LOG_PROBS, OUTPUT_LOG_PROBS, OUTPUT_TOKENS, TOP_LOG_PROBS, *TIME_OUTPUTS,
)  # fmt: skip


@dataclass(frozen=True)
class ModelContract:
    """The inputs and outputs of one Triton model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


TOKENIZER = ModelContract(inputs=PROMPT_INPUTS, outputs=(INPUT_IDS, PROMPT_INFO))
ENGINE = ModelContract(
    inputs=(INPUT_IDS, PROMPT_INFO, *ANSWER_INPUTS, *COMPATIBLE_INPUTS, STOP, DESCRIBE),
    outputs=(OUTPUT_IDS, PROGRESS, MAX_SEQ_LEN),
)
DETOKENIZER = ModelContract(inputs=(OUTPUT_IDS, PROGRESS), outputs=(*ALWAYS_OUTPUTS, *ASKED_OUTPUTS))
# What this project's clients send and read, and what the ensemble takes and gives.
GENERATE = ModelContract(inputs=(*PROMPT_INPUTS, *ANSWER_INPUTS), outputs=DETOKENIZER.outputs)
ENSEMBLE = ModelContract(inputs=(*GENERATE.inputs, *COMPATIBLE_INPUTS), outputs=GENERATE.outputs)

# Of the model of Triton's vLLM backend: what the engine sends and reads.
VLLM = ModelContract(
    inputs=(
        TEXT_INPUT, TensorSpec("sampling_parameters", "STRING", optional=True),
        *(TensorSpec(name, "BOOL", optional=True) for name in (
            "stream", "exclude_input_in_output", "return_finish_reason", "return_logprobs"
        )),
    ),
    outputs=(TEXT_OUTPUT, FINISH_REASON, TensorSpec("logprobs", "STRING", (-1,))),
)  # fmt: skip

SCORE_ROW = (SCORE_IDS, BRANCH_IDS, LOGIT_POSITIONS, TARGET_LOGITS, TARGET_IDS)
SCORE_RESULTS = (LABEL, PROBABILITIES, LOG_PROBS, IS_CALIBRATED)
SCORE_TOKENIZER = ModelContract(
    inputs=(TEXT_INPUT, MESSAGES, LABELS), outputs=(*SCORE_ROW, TARGET_LABELS, SCORED_LABELS, NUM_INPUT_TOKENS)
)
SCORE_ENGINE = ModelContract(inputs=SCORE_ROW, outputs=(TOKEN_LOG_PROBS, HIDDEN_STATE))
SCORER = ModelContract(inputs=(TOKEN_LOG_PROBS, HIDDEN_STATE, TARGET_LABELS, SCORED_LABELS), outputs=SCORE_RESULTS)
SCORE = ModelContract(inputs=(TEXT_INPUT, MESSAGES, LABELS), outputs=(*SCORE_RESULTS, SCORED_LABELS, NUM_INPUT_TOKENS))
SCORE_AND_EMBED = ModelContract(SCORE.inputs, (*SCORE.outputs, EMBEDDING))
