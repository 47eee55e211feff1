"""The table of request options: everything that a client can say with a request, each option told once.

The contract's tensors, the clients' checks, the command line, the adapters, the ranges and defaults of `SamplingParams`
and `RequestOptions`, and the table in docs/requests.md derive from it. It knows nothing of Triton, clients or engines.

Names and dtypes are those of NVIDIA's `inflight_batcher_llm` ensemble where it has them. The order of the rows is the
order of the inputs in config.pbtxt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from deepseek_triton.ensemble.protocol.ranges import (
    ANY_FLOAT,
    MAX_UINT64,
    NON_NEGATIVE_FLOAT,
    POSITIVE_FLOAT,
    Range,
    at_least,
    between,
)
from deepseek_triton.ensemble.protocol.tensor_spec import DType, TensorSpec

Group = Literal["prompt", "answer", "output", "schedule"]
GROUPS: dict[Group, str] = {
    "prompt": "The prompt",
    "answer": "How the answer is made",
    "output": "What the answer holds",
    "schedule": "When the request runs",
}
GuideType = Literal["json", "json_schema", "regex", "grammar", "ebnf_grammar", "choice"]
GUIDE_TYPES: tuple[GuideType, ...] = get_args(GuideType)

MAX_LOG_PROBS = 20  # OpenAI's limit
MAX_RETURN_SEQUENCES = 64
NO_END_ID = -1  # the value of end_id that lets nothing but the length end a text


@dataclass(frozen=True)
class RequestOption:
    """One thing that a request can say.

    tensor_name, dtype, dims: its input tensor; dims without the batch dimension, -1: any number of values.
    meaning: what it does, in one sentence that is also its help on the command line.
    field: its name in `GenerateRequest`, `SamplingParams` and `RequestOptions`; empty: the tensor's.
    range: the allowed numbers; None where it is no number.
    default: the value that holds where it is absent; None where that depends on the model, the server or the request.
    default_note: what holds where it is absent, in words; empty: the default says it.
    flag: its option on the command line; empty: it has none.
    """

    group: Group
    tensor_name: str
    dtype: DType
    meaning: str
    dims: tuple[int, ...] = (1,)
    field: str = ""
    range: Range | None = None
    default: Any = None
    default_note: str = ""
    flag: str = ""

    def __post_init__(self) -> None:
        """Fill in the field's name."""
        object.__setattr__(self, "field", self.field or self.tensor_name)

    @property
    def tensor(self) -> TensorSpec:
        """The input tensor."""
        return TensorSpec(self.tensor_name, self.dtype, self.dims, optional=True)

    @property
    def is_list(self) -> bool:
        """Whether it takes any number of values."""
        return self.dims == (-1,)


REQUEST_OPTIONS: tuple[RequestOption, ...] = (
    RequestOption(
        "prompt", "text_input", "STRING", field="prompt",
        meaning="The text to continue, without a chat template.",
        default_note="`messages` is given",
    ),
    RequestOption(
        "prompt", "messages", "STRING",
        meaning="A chat as JSON, which goes through the model's chat template: a list of messages, or an object with "
        "`messages`, `tools` and `chat_template_kwargs`.",
        default_note="`text_input` is given",
    ),
    RequestOption(
        "prompt", "enable_thinking", "BOOL", flag="--no-thinking",
        meaning="Whether the model reasons before it answers, where its chat template can choose; only with "
        "`messages`.",
        default_note="the template's",
    ),
    RequestOption(
        "prompt", "separate_reasoning", "BOOL",
        meaning="Whether reasoning comes apart from the answer's text.",
        default_note="true with `messages`, false with `text_input`",
    ),
    RequestOption(
        "answer", "max_tokens", "INT32", range=at_least(1), flag="--max-tokens",
        meaning="The largest number of new tokens.",
        default_note="up to the context's end",
    ),
    RequestOption(
        "answer", "min_tokens", "INT32", range=at_least(0), default=0,
        meaning="The number of new tokens before which no end token may come.",
    ),
    RequestOption(
        "answer", "temperature", "FP32", range=NON_NEGATIVE_FLOAT, flag="--temperature",
        meaning="The divisor of the logits before sampling; 0 always takes the likeliest token.",
        default_note="the checkpoint's, else 1 if `top_k`, `top_p` or `min_p` is given, else 0",
    ),
    RequestOption(
        "answer", "top_k", "INT32", default=0, flag="--top-k",
        range=Range(0, at_least(0).high, "at least 1, or 0 for all tokens"),
        meaning="Sample among this many of the likeliest tokens; 0: among all.",
    ),
    RequestOption(
        "answer", "top_p", "FP32", default=1.0, flag="--top-p",
        range=Range(0.0, 1.0, "above 0 and at most 1", excludes_low=True),
        meaning="Of these, sample among the likeliest that together hold this probability; 1: among all.",
    ),
    RequestOption(
        "answer", "min_p", "FP32", range=between(0.0, 1.0), default=0.0, flag="--min-p",
        meaning="Of these, sample among those at least this many times as probable as the likeliest; 0: among all.",
    ),
    RequestOption(
        "answer", "seed", "UINT64", flag="--seed",
        range=Range(0, MAX_UINT64, "at least 0 and below 2**64"),
        meaning="The seed of the random numbers; the same seed gives the same text, alone or in a full batch.",
        default_note="a random one",
    ),
    RequestOption(
        "answer", "repetition_penalty", "FP32", range=POSITIVE_FLOAT, default=1.0, flag="--repetition-penalty",
        meaning="Divides the positive logits of the tokens of prompt and answer and multiplies the negative ones, as "
        "in Hugging Face; 1: no penalty.",
    ),
    RequestOption(
        "answer", "presence_penalty", "FP32", range=ANY_FLOAT, default=0.0, flag="--presence-penalty",
        meaning="Is subtracted from the logits of the answer's tokens, as in OpenAI's API.",
    ),
    RequestOption(
        "answer", "frequency_penalty", "FP32", range=ANY_FLOAT, default=0.0, flag="--frequency-penalty",
        meaning="Is subtracted from the logits of the answer's tokens as many times as each has come, as in OpenAI's "
        "API.",
    ),
    RequestOption(
        "answer", "stop_words", "STRING", dims=(-1,), default=(), flag="--stop",
        meaning="Texts that end the answer wherever their tokens are cut, and are no part of it.",
    ),
    RequestOption(
        "answer", "bad_words", "STRING", dims=(-1,), default=(),
        meaning="Texts that never come in the answer.",
    ),
    RequestOption(
        "answer", "end_id", "INT32",
        range=Range(NO_END_ID, at_least(0).high, "a token id, or -1 for none"),
        meaning="The token that ends the text instead of the model's own; -1: none does.",
        default_note="the model's own",
    ),
    RequestOption(
        "answer", "pad_id", "INT32",
        meaning="Is accepted for the sake of NVIDIA's clients and has no effect: nothing is padded.",
        default_note="no effect",
    ),
    RequestOption(
        "answer", "num_return_sequences", "INT32", range=between(1, MAX_RETURN_SEQUENCES), default=1, flag="--n",
        meaning="The number of answers to the one prompt, which is computed once; more than one need a temperature.",
    ),
    RequestOption(
        "answer", "guided_decoding_guide_type", "STRING", field="guide_type",
        meaning="What the guide is: `json` (any object), `json_schema`, `regex`, `grammar` (Lark, or EBNF in "
        "llama.cpp's form), `ebnf_grammar` or `choice` (a JSON list of texts).",
        default_note="no guide",
    ),
    RequestOption(
        "answer", "guided_decoding_guide", "STRING", field="guide",
        meaning="The guide that the answer's text must follow.",
        default_note="no guide",
    ),
    RequestOption(
        "answer", "thinking_token_budget", "INT32", range=at_least(0), flag="--thinking-budget",
        meaning="The number of reasoning tokens after which `</think>` is forced.",
        default_note="no limit",
    ),
    RequestOption(
        "output", "stream", "BOOL", default=False,
        meaning="Whether a response comes for each token, or for several when the client lags, instead of one at the "
        "end.",
    ),
    RequestOption(
        "output", "exclude_input_in_output", "BOOL", default=True,
        meaning="False: the text begins with the prompt (NVIDIA's default).",
    ),
    RequestOption(
        "output", "return_log_probs", "BOOL", default=False,
        meaning="Whether the new tokens' log probabilities come too: those of the model's own distribution, before "
        "penalties, temperature and guides.",
    ),
    RequestOption(
        "output", "num_top_log_probs", "INT32", range=between(0, MAX_LOG_PROBS), default=0, flag="--log-probs",
        meaning="The number of likeliest tokens that come beside each new token, with their log probabilities; above "
        "0, it implies `return_log_probs`.",
    ),
    RequestOption(
        "output", "return_num_input_tokens", "BOOL", default=True,
        meaning="Whether the number of the prompt's tokens comes.",
    ),
    RequestOption(
        "output", "return_num_output_tokens", "BOOL", default=True,
        meaning="Whether the number of new tokens comes: the response's own, which clients add up. Left out by one "
        "that sends the parameter `stop_key`, as this project's clients do: the sequence's so far.",
    ),
    RequestOption(
        "output", "return_perf_metrics", "BOOL", default=False,
        meaning="Whether the four times of the answer come.",
    ),
    RequestOption(
        "schedule", "priority", "INT32",
        range=Range(0, at_least(0).high, "at least 1 (most urgent), or 0 for the default"),
        meaning="The request's place in the queue: 1 is the most urgent of the engine's `priority_levels`, 0 the "
        "middle one.",
        default_note="the middle level",
    ),
    RequestOption(
        "schedule", "queue_timeout_ms", "INT32", range=at_least(0),
        meaning="The longest wait for a slot in ms, after which the request fails; 0: no limit.",
        default_note="the engine's `queue_timeout_ms`",
    ),
    RequestOption(
        "schedule", "timeout_ms", "INT32", range=at_least(0),
        meaning="The longest time for the whole request in ms, after which it fails; 0: no limit.",
        default_note="the engine's `timeout_ms`",
    ),
)  # fmt: skip

OPTIONS_BY_FIELD: dict[str, RequestOption] = {option.field: option for option in REQUEST_OPTIONS}
RANGES: dict[str, Range] = {option.field: option.range for option in REQUEST_OPTIONS if option.range is not None}


def default_of(field: str) -> Any:
    """The value that holds where the option is absent."""
    return OPTIONS_BY_FIELD[field].default
