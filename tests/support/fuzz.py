"""Requests gone wrong, made from good ones: seeded, endless, over every way into the server.

A mutation changes values, types, shapes, names, bytes or the framing. Most requests end with an error; those that don't
generate a token or two.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tritonclient.grpc import service_pb2

from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import TensorSpec

Way = Literal["generate", "generate_stream", "infer", "grpc"]
WAYS: tuple[Way, ...] = ("generate", "generate_stream", "infer", "grpc")
LAYOUTS = {"BOOL": "?", "INT32": "i", "INT64": "q", "UINT64": "Q", "FP32": "f"}
DTYPES = (*LAYOUTS, "BYTES", "FP64", "INT8", "UINT8", "FP16")

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 64, 65, 1024, 2**31 - 1, -(2**31), 2**31, 2**53, 2**63, 2**64 - 1, 2**64, 10**30,
    0.0, -0.0, 0.5, 1.0, 1.5, 1e-30, 1e30, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", " ", "a", "\0", "\n" * 50, "é", "你好", "\U0001f680", "\ud800", "\ufffd", "word " * 600, "[]", "{}", "null",
    "<think>", "</think>", "<|im_end|>", "a" * 5000, '"', "\\", "json", "json_schema", "regex", "choice", "(", "[a-z]+",
    '{"type": "object"}', '["a", "b"]', '[{"role": "user", "content": "Hi"}]', '[{"role": 5}]', '[{"role": "user"}]',
    '{"messages": [], "tools": 3}', '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "true", "1e999",
)  # fmt: skip
ODD: tuple[Any, ...] = (None, [], {}, [[]], [1, 2], ["a", "b"], {"a": 1}, [None], True, False, [[[[1]]]])


@dataclass(frozen=True)
class FuzzRequest:
    """`payload`: a body for HTTP, a message for gRPC."""

    way: Way
    payload: bytes | service_pb2.ModelInferRequest


class Fuzzer:
    """Makes requests of the served model `name`; the same seed makes the same ones."""

    def __init__(self, name: str, seed: int) -> None:
        self._name = name
        self._random = random.Random(seed)

    def request(self) -> FuzzRequest:
        """The next one."""
        way = self._random.choice(WAYS)
        fields = self._good_fields()
        for _ in range(self._random.choice((0, 1, 1, 1, 2, 3))):
            self._random.choice(MUTATIONS)(self, fields)
        if way == "grpc":
            return FuzzRequest(way, self._grpc_message(fields))
        body = fields if way != "infer" else self._infer_body(fields)
        return FuzzRequest(way, self._broken(json.dumps(body).encode("utf-8", "surrogatepass")))

    def _good_fields(self) -> dict[str, Any]:
        pick = self._random
        fields: dict[str, Any] = {"max_tokens": pick.randint(1, 2), "timeout_ms": 3000, "id": str(pick.randint(0, 99))}
        if pick.random() < 0.7:
            fields["text_input"] = pick.choice(("Hello", "The sky is", "1 2 3"))
        else:
            fields["messages"] = json.dumps([{"role": "user", "content": "Hi"}])
        for spec in pick.sample(contract.ANSWER_INPUTS, pick.randint(0, 4)):
            fields.setdefault(spec.name, GOOD.get(spec.name, True))
        return fields

    def _any_value(self) -> Any:
        return copy.deepcopy(self._random.choice(self._random.choice((NUMBERS, TEXTS, ODD))))

    def _change_value(self, fields: dict[str, Any]) -> None:
        fields[self._random.choice(list(fields) or ["text_input"])] = self._any_value()

    def _add_known(self, fields: dict[str, Any]) -> None:
        fields[self._random.choice(contract.GENERATE.inputs).name] = self._any_value()

    def _add_unknown(self, fields: dict[str, Any]) -> None:
        name = self._random.choice(
            ("", "x", "parameters", "input_ids", "stop", "prompt_info", "sequence_id", "a" * 300)
        )
        fields[name] = self._any_value()

    def _remove(self, fields: dict[str, Any]) -> None:
        if fields:
            del fields[self._random.choice(list(fields))]

    def _broken(self, body: bytes) -> bytes:
        """Now and then bytes are lost, doubled or changed."""
        if self._random.random() > 0.15 or not body:
            return body
        position = self._random.randrange(len(body))
        return self._random.choice(
            (
                body[:position],
                body[:position] + bytes([self._random.randrange(256)]) + body[position + 1 :],
                body[:position] + body,
                b"",
                b"[" * 200,
            )
        )

    def _infer_body(self, fields: dict[str, Any]) -> dict[str, Any]:
        inputs = [
            {
                "name": name,
                "datatype": self._dtype(name),
                "shape": self._shape(),
                "data": value if isinstance(value, list) else [value],
            }
            for name, value in fields.items()
            if name != "id"
        ]
        return {"id": fields.get("id"), "inputs": inputs}

    def _grpc_message(self, fields: dict[str, Any]) -> service_pb2.ModelInferRequest:
        message = service_pb2.ModelInferRequest(
            model_name=self._name, id=str(fields.pop("id", ""))[:64].encode("utf-8", "replace").decode()
        )
        for name, value in fields.items():
            dtype = self._dtype(name)
            raw = (
                self._random.randbytes(self._random.randint(0, 20))
                if self._random.random() < 0.1
                else _raw(dtype, value)
            )
            message.inputs.add(name=name, datatype=dtype, shape=self._shape())
            message.raw_input_contents.append(raw)
        if message.raw_input_contents and self._random.random() < 0.05:
            message.raw_input_contents.pop()
        return message

    def _dtype(self, name: str) -> str:
        spec = SPECS.get(name)
        if spec is None or self._random.random() < 0.05:
            return self._random.choice(DTYPES)
        return "BYTES" if spec.dtype == "STRING" else spec.dtype

    def _shape(self) -> list[int]:
        return self._random.choice(
            ([1, 1],) * 30 + ([1], [], [0], [1, 0], [2, 1], [1, 2], [1, 1, 1], [-1, 1], [1, 2**31])
        )


SPECS: dict[str, TensorSpec] = {spec.name: spec for spec in contract.GENERATE.inputs}
GOOD: dict[str, Any] = {
    "min_tokens": 1, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3, "repetition_penalty": 1.1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "stop_words": ["zzz"], "bad_words": ["zzz"], "end_id": 2,
    "pad_id": 0, "num_return_sequences": 1, "guided_decoding_guide_type": "choice",
    "guided_decoding_guide": '["a"]', "num_top_log_probs": 2, "priority": 2, "queue_timeout_ms": 60000,
    "timeout_ms": 60000,
}  # fmt: skip
MUTATIONS: tuple[Callable[[Fuzzer, dict[str, Any]], None], ...] = (
    Fuzzer._change_value, Fuzzer._change_value, Fuzzer._add_known, Fuzzer._add_unknown, Fuzzer._remove,
)  # fmt: skip


def _raw(dtype: str, value: Any) -> bytes:
    """The bytes of one value, as far as the dtype can hold it."""
    values = value if isinstance(value, list) else [value]
    if dtype == "BYTES":
        texts = [str(v).encode("utf-8", "surrogatepass") for v in values]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    try:
        return b"".join(struct.pack("<" + LAYOUTS[dtype], v) for v in values)
    except (KeyError, struct.error, OverflowError):
        return repr(value).encode("utf-8", "surrogatepass")[:8]
