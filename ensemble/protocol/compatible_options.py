"""The inputs of other ensembles that their clients send: what each is here, told once.

They are the inputs of the ensembles in NVIDIA's tensorrtllm_backend v0.5.0 to v0.19.0 and of its vllm_backend that
`request_options.py` doesn't have. The ensemble declares them all, since Triton drops an undeclared field of an HTTP
request without a word. An alias stands for an option under its older name. Any other input has values that change
nothing, which are taken; other values are refused by name. The contract's tensors, the adapters and the table in
docs/migrating.md derive from these rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepseek_triton.ensemble.protocol.tensor_spec import DType, TensorSpec


@dataclass(frozen=True)
class CompatibleOption:
    """One input that only other ensembles' clients send.

    tensor_name, dtype, dims: its input tensor; dims without the batch dimension, -1: any number of values.
    meaning: what it is here, in one sentence.
    alias_of: the tensor of the option that it is another name of; empty: it has none.
    neutral: the values that are taken because they change nothing; an empty text or list always is one.
    note: what else docs/migrating.md says of it, and a refusal doesn't.
    """

    tensor_name: str
    dtype: DType
    meaning: str
    dims: tuple[int, ...] = (1,)
    alias_of: str = ""
    neutral: tuple[Any, ...] = ()
    note: str = ""

    @property
    def tensor(self) -> TensorSpec:
        """The input tensor."""
        return TensorSpec(self.tensor_name, self.dtype, self.dims, optional=True)


COMPATIBLE_OPTIONS: tuple[CompatibleOption, ...] = (
    CompatibleOption("random_seed", "UINT64", "The older name of `seed`.", alias_of="seed"),
    CompatibleOption("min_length", "INT32", "The older name of `min_tokens`.", alias_of="min_tokens"),
    CompatibleOption(
        "beam_width", "INT32", "There is no beam search.", neutral=(1,),
        note="A client that sends it gets `batch_index` too, and no prompt in a stream.",
    ),
    CompatibleOption("length_penalty", "FP32", "It is for beam search, which there is none of.", neutral=(0.0, 1.0)),
    CompatibleOption("return_context_logits", "BOOL", "Logits don't leave the engine.", neutral=(False,)),
    CompatibleOption("return_generation_logits", "BOOL", "Logits don't leave the engine.", neutral=(False,)),
    CompatibleOption(
        "return_kv_cache_reuse_stats", "BOOL", "Reuse is counted for all requests together: `/metrics` has it.",
        neutral=(False,),
    ),
    CompatibleOption("embedding_bias_words", "STRING", "There are no biases of single tokens.", dims=(-1,)),
    CompatibleOption(
        "embedding_bias_weights", "FP32", "There are no biases of single tokens.", dims=(-1,), neutral=(0.0,)
    ),
    CompatibleOption("decoder_text_input", "STRING", "It is for models with an encoder."),
    CompatibleOption("prompt_vocab_size", "INT32", "There are no prompt embeddings.", neutral=(0,)),
    CompatibleOption("prompt_table_extra_id", "UINT64", "There are no prompt embeddings."),
    CompatibleOption("lora_task_id", "UINT64", "There are no LoRA adapters at run time: merge them at the build."),
    CompatibleOption("num_draft_tokens", "INT32", "There is no speculative decoding.", neutral=(0,)),
    CompatibleOption("use_draft_logits", "BOOL", "There is no speculative decoding.", neutral=(False,)),
    CompatibleOption(
        "sampling_parameters", "STRING", "The JSON of vLLM's SamplingParams; `vllm_parameters.py` reads it.",
        alias_of="sampling_parameters",
    ),
    CompatibleOption("return_finish_reason", "BOOL", "`finish_reason` always comes.", neutral=(False, True)),
    CompatibleOption("return_logprobs", "BOOL", "vLLM's form of log probabilities: ask for `return_log_probs`.",
        neutral=(False,),
    ),
    CompatibleOption("return_cumulative_logprob", "BOOL", "`return_log_probs` gives `cum_log_probs`.",
        neutral=(False,),
    ),
    CompatibleOption("return_token_ids", "BOOL", "`NAME-engine` gives token ids.", neutral=(False,)),
)  # fmt: skip

COMPATIBLE_BY_NAME: dict[str, CompatibleOption] = {option.tensor_name: option for option in COMPATIBLE_OPTIONS}
