"""A stand-in for Triton's vLLM backend, which a real tritonserver loads as its backend `vllm`: same tensors, no vLLM.

It answers a prompt in capital letters, a prompt that ends with "parameters" with the parameters that it got, and one
that ends with "fail" with an error. It runs in a stub, without this project's tests.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Reads model.json as the real one does, and vLLM's tokenizer."""

    def initialize(self, args: dict[str, str]) -> None:
        """Check what the real backend would check."""
        config = json.loads(args["model_config"])
        assert config["model_transaction_policy"]["decoupled"] and config["max_batch_size"] == 0
        arguments = json.loads((Path(pb_utils.get_model_dir()) / "model.json").read_text())
        assert Path(arguments["model"], "config.json").exists()
        self._tokenizer = tokenizers.Tokenizer.from_file(str(Path(arguments["tokenizer"], "tokenizer.json")))

    def execute(self, requests: list[Any]) -> None:
        """Answer each request token by token."""
        for request in requests:
            self._answer({tensor.name(): tensor.as_numpy()[0] for tensor in request.inputs()}, request)

    def _answer(self, inputs: dict[str, Any], request: Any) -> None:
        sender = request.get_response_sender()
        prompt = inputs["text_input"].decode()
        parameters = json.loads(inputs["sampling_parameters"].decode())
        assert all(inputs[name] for name in ("stream", "exclude_input_in_output", "return_logprobs"))
        if prompt.endswith("fail"):
            error = pb_utils.TritonError("Error generating stream: no such luck")
            sender.send(pb_utils.InferenceResponse(error=error), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return
        answer = json.dumps(parameters) if prompt.endswith("parameters") else prompt.upper()
        ids = self._tokenizer.encode(answer).ids
        end = parameters["stop_token_ids"][:1]
        ids = (ids + end)[: parameters["max_tokens"]]
        text = ""
        for index, token in enumerate(ids):
            is_end = [token] == end and index == len(answer)
            text += "" if is_end else self._tokenizer.decode([token])
            is_stopped = is_end or any(word in text for word in parameters.get("stop", []))
            is_last = is_stopped or index == len(ids) - 1
            top = {token: 0.5, **{(token + k) % 300: 1 / (k + 2) for k in range(1, parameters["logprobs"])}}
            row = {str(k): {"logprob": float(np.log(v)), "rank": 1, "decoded_token": None} for k, v in top.items()}
            reason = ("stop" if is_stopped else "length") if is_last else "None"
            tensors = {"text_output": "", "finish_reason": reason, "logprobs": json.dumps([row])}
            sender.send(
                pb_utils.InferenceResponse(
                    [pb_utils.Tensor(name, np.array([value.encode()], np.object_)) for name, value in tensors.items()]
                ),
                pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0,
            )
            if is_last:
                return
            time.sleep(0.001)
