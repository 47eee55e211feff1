"""Options of a request → what vLLM is asked: a text, and the parameters of its SamplingParams.

vLLM's backend takes texts, so the prompt's ids become a text again; a prompt whose text has other ids is refused. What
vLLM can't do is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_triton.ensemble.engine.admission import Admission, OptionError, RequestOptions
from deepseek_triton.ensemble.engine.sequence import RemoteRequest, Request, Sink

# The guide's type → the key of vLLM's StructuredOutputsParams, and its value.
GUIDES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "json": ("json_object", lambda guide: True),
    "json_schema": ("json", str),
    "regex": ("regex", str),
    "choice": ("choice", json.loads),
    "grammar": ("grammar", str),
    "ebnf_grammar": ("grammar", str),
}


class RemoteAdmission(Admission):
    """Makes requests whose tokens vLLM computes."""

    def is_quick(self, options: RequestOptions) -> bool:
        """True: vLLM compiles the guides."""
        return True

    def make_request(
        self,
        stream_id: int,
        request_id: str,
        prompt_ids: NDArray[np.int64],
        options: RequestOptions,
        sink: Sink,
        now: float,
        stop_key: str = "",
    ) -> Request:
        """See Admission.

        Raises:
            OptionError: as Admission, or vLLM can't do what is asked.
        """
        if options.thinking_token_budget is not None:
            raise OptionError("thinking_token_budget isn't here with target vllm; leave it out")
        if options.guide_type is not None and options.prompt_info and options.prompt_info.is_reasoning_open:
            raise OptionError("a guide would bind the reasoning too with target vllm: set enable_thinking to false")
        # vLLM follows the guide and avoids the words: here nothing looks after them.
        own = replace(options, guide_type=None, guide=None, bad_words=())
        request = super().make_request(stream_id, request_id, prompt_ids, own, sink, now, stop_key)
        request.remote = RemoteRequest(self._text(prompt_ids), self._parameters(options))
        return request

    def _text(self, prompt_ids: NDArray[np.int64]) -> str:
        text = self._tokenizer.text_of(prompt_ids)
        if not np.array_equal(self._tokenizer.encode_continuation(text), prompt_ids):
            raise OptionError(
                "the prompt holds tokens that its text doesn't give again, and vLLM's backend takes texts: leave "
                "control tokens and half characters out of it"
            )
        return text

    def _parameters(self, options: RequestOptions) -> dict[str, Any]:
        """The parameters of SamplingParams, `max_tokens` and `seed` aside."""
        params = options.params
        parameters: dict[str, Any] = {
            "temperature": params.effective_temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "min_tokens": params.min_tokens,
            # The end tokens are the request's own, and no others; the ids come with the log probabilities.
            "ignore_eos": True,
            "stop_token_ids": sorted(params.effective_end_ids(self._end_ids)),
            "logprobs": params.num_log_probs or 0,
            "detokenize": bool(options.stop_words),
        }
        if options.stop_words:
            parameters |= {"stop": list(options.stop_words), "include_stop_str_in_output": True}
        if options.bad_words:
            parameters["bad_words"] = list(options.bad_words)
        if options.guide_type is not None:
            key, read = GUIDES[options.guide_type]
            try:
                guide = read(options.guide or "")
            except ValueError as error:
                raise OptionError(f"guided_decoding_guide is no JSON: {error}") from error
            parameters["structured_outputs"] = json.dumps({key: guide})
        return parameters
