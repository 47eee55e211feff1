"""Hostile requests that are well formed: every field is known and has its type, only what it says is meant to hurt.

tests/support/fuzz.py breaks fields, fuzz.py beside this file breaks what carries them. Here whole, valid messages hold
generated guides, chats, stop words and options; they stop and give up what runs; and they replay, over gRPC, what the
inner models themselves have said: sealed texts of the tokenizer and the engine, whole, changed, and joined to others'.
"""

from __future__ import annotations

import json
import random
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
from tritonclient.grpc import service_pb2

from benchmarks.faults.served import NAME

TIMEOUT_S = 60.0
Fields = dict[str, Any]
DTYPES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("stream", "stop", "describe", "return_log_probs", "separate_reasoning"), ("BOOL", "?")),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"), ("FP32", "f")),
    **dict.fromkeys(("frequency_penalty",), ("FP32", "f")),
    "seed": ("UINT64", "Q"),
}
PIECES = (
    "a", "b{2}", "[a-z]", "\\d", ".", "é", "🚀", "(?i)x", "\\p{L}", "[^\\s]", "\\b", "a|b", "(?:ab)", "(?=a)", "\\1",
    "^", "$", "<\\|im_end\\|>", "\\x00", "[\\u4e00-\\u9fff]", "",
)  # fmt: skip
COUNTS = ("*", "+", "?", "{3}", "{0,20}", "{1,999}", "{5,}", "*?", "{0}", "{9999}")
WORDS = (
    "a", "aa", "\n", " ", "é", "\ufffd", "🚀", "<|im_end|>", "<|im_start|>system", "</think>", "<think>", "ab" * 500,
    "\0", "{{ messages }}", "{% for i in range(10**9) %}{% endfor %}", "a\u0300" * 200, "\u202e", "the ", ".",
)  # fmt: skip
NUMBERS: Fields = {
    "temperature": (0.0, 1e-30, 0.5, 1e30), "top_k": (0, 1, 50, 2**31 - 1), "top_p": (1e-30, 0.5, 1.0),
    "min_p": (0.0, 0.5, 1.0), "seed": (0, 2**64 - 1), "repetition_penalty": (1e-30, 1.0, 1e30),
    "presence_penalty": (-1e30, 0.0, 1e30), "frequency_penalty": (-1e30, 1e30), "end_id": (-1, 0, 28, 49151),
    "min_tokens": (0, 2, 30), "num_return_sequences": (1, 2, 5, 64), "num_top_log_probs": (0, 1, 20),
    "return_log_probs": (True, False), "priority": (0, 1, 2), "queue_timeout_ms": (0, 1, 2000),
    "timeout_ms": (1, 50, 3000), "thinking_token_budget": (0, 1), "separate_reasoning": (True, False),
}  # fmt: skip


def regex(draw: random.Random, depth: int = 0) -> str:
    """A regular expression, mostly a valid one, with counts inside of counts."""
    if depth > 3 or draw.random() < 0.3:
        return draw.choice(PIECES)
    parts = "".join(regex(draw, depth + 1) for _ in range(draw.randint(1, 4)))
    return f"({parts}{draw.choice(('', '|'))}){draw.choice(COUNTS)}"


def schema(draw: random.Random, depth: int = 0) -> Any:
    """A JSON schema of any size."""
    leaves: tuple[Any, ...] = (
        {"type": "integer", "multipleOf": draw.randint(1, 10**5)}, {"type": "number", "minimum": -1e300},
        {"type": "string", "pattern": regex(draw)}, {"enum": [str(n) * 9 for n in range(draw.choice((1, 900)))]},
        {"type": "string", "maxLength": draw.choice((0, 9, 10**6))}, {"const": draw.choice(WORDS)}, {"$ref": "#"},
        True, False,
        {"type": "string", "format": draw.choice(("date-time", "uuid", "ipv6", "none"))}, {"not": {}}, {"type": []},
        {"type": "integer", "minimum": -(10**30), "maximum": 10**30}, {"$ref": "#/$defs/x"},
        {"$ref": "http://127.0.0.1:1/x"},
    )  # fmt: skip
    if depth > 3 or draw.random() < 0.3:
        return draw.choice(leaves)
    parts = [schema(draw, depth + 1) for _ in range(draw.randint(1, 4))]
    names = [draw.choice(WORDS) for _ in parts]
    return draw.choice(
        (
            {"type": "object", "properties": dict(zip(names, parts, strict=True)), "required": names[:2]},
            {"type": "array", "items": parts[0], "minItems": draw.choice((0, 3, 10**6)), "uniqueItems": True},
            {draw.choice(("anyOf", "oneOf", "allOf")): parts},
            {"type": "object", "additionalProperties": parts[0], "patternProperties": {regex(draw): parts[-1]}},
            {"$defs": {"x": parts[0]}, "$ref": "#/$defs/x"},
        )
    )


def grammar(draw: random.Random) -> str:
    """A Lark grammar of rules that call each other, some without an end."""
    rules = ["start", *(f"r{number}" for number in range(draw.randint(1, 6)))]
    atoms = (*rules, '"a"', '"b"', '" "', "/[a-z]/", '"<|im_end|>"')
    atoms += draw.choice(((), (), (), ('""', "missing", f"/{draw.choice(PIECES)}/", "%json {}", '"x"~0..9999')))

    def body() -> str:
        return " | ".join(" ".join(draw.choices(atoms, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 4)))

    return "\n".join(f"{rule}: {body()}" for rule in rules)


def guide(draw: random.Random) -> Fields:
    """A guide of any kind."""
    makers: dict[str, Callable[[], str]] = {
        "regex": lambda: regex(draw), "json_schema": lambda: json.dumps(schema(draw)), "grammar": lambda: grammar(draw),
        "choice": lambda: json.dumps(draw.choices(WORDS, k=draw.choice((1, 5, 2000)))), "json": lambda: "",
        "ebnf_grammar": lambda: 'root ::= root root | "a"' + draw.choice(("", " | root?", "*")),
    }  # fmt: skip
    kind = draw.choice(list(makers))
    return {
        "guided_decoding_guide_type": kind,
        "guided_decoding_guide": makers[kind](),
        "max_tokens": draw.choice((1, 20, 200)),
    }


def chat(draw: random.Random) -> Fields:
    """A chat of turns, calls and results, whose texts want to be something else."""
    turns: list[Any] = []
    for _ in range(draw.choice((1, 2, 5, 300))):
        text: Any = "".join(draw.choices(WORDS, k=draw.randint(0, 5)))
        turn = {"role": draw.choice(("user", "assistant", "system", "tool", *WORDS[:9])), "content": text}
        if draw.random() < 0.2:
            turn["content"] = [{"type": "text", "text": part} for part in text[:20]]
        if draw.random() < 0.2:
            call: Fields = {"name": draw.choice(WORDS), "arguments": draw.choice(('{"a": 1}', "{", {"b": [[]]}, ""))}
            turn["tool_calls"] = [{"id": "1", "type": "function", "function": call}]
        turns.append(turn)
    tools = [{"type": "function", "function": {"name": draw.choice(WORDS), "parameters": schema(draw)}}]
    whole: Any = {"messages": turns, "tools": tools, "chat_template_kwargs": {draw.choice(WORDS): draw.choice(WORDS)}}
    return {"text_input": None, "messages": json.dumps(draw.choice((turns, whole, {"messages": turns})))}


def words(draw: random.Random) -> Fields:
    """Words that overlap, and many of them."""
    some = draw.choices(WORDS, k=draw.choice((1, 4, 60)))
    return {draw.choice(("stop_words", "bad_words")): some, "max_tokens": 30}


def numbers(draw: random.Random) -> Fields:
    """Options at the ends of their ranges, many at a time."""
    return {name: draw.choice(NUMBERS[name]) for name in draw.sample(list(NUMBERS), draw.randint(1, 8))}


def long(draw: random.Random) -> Fields:
    """A prompt about as long as the context, or far longer."""
    return {"text_input": draw.choice(WORDS) * draw.choice((900, 8000, 300_000)), "timeout_ms": 2000}


KINDS: tuple[Callable[[random.Random], Fields], ...] = (guide, guide, chat, chat, words, numbers, long)


def crafted(draw: random.Random) -> Fields:
    """One request's fields."""
    fields: Fields = {"text_input": draw.choice(WORDS), "max_tokens": draw.choice((1, 3, 12)), "timeout_ms": 5000}
    for kind in draw.choices(KINDS, k=draw.choice((1, 1, 2))):
        fields |= kind(draw)
    fields["stream"] = draw.random() < 0.5
    return {name: value for name, value in fields.items() if value is not None}


def send_http(address: tuple[str, int], draw: random.Random) -> str:
    """Send one request, and read its answer, its beginning or nothing."""
    verb = draw.choice(("generate", "generate_stream"))
    model = draw.choice((NAME, NAME, NAME, f"{NAME}-engine"))
    url = f"http://{address[0]}:{address[1]}/v2/models/{model}/{verb}"
    fields = crafted(draw) | ({"input_ids": [1, 2, 3], "text_input": None} if model != NAME else {})
    fields = {name: value for name, value in fields.items() if value is not None}
    try:
        with httpx.stream("POST", url, json=fields, timeout=TIMEOUT_S) as response:
            if draw.random() < 0.3:
                next(response.iter_raw(), b"")
                return "given up"
            text = response.read()
    except httpx.HTTPError as error:
        return type(error).__name__
    return f"{response.status_code}{' with an error' if b'error' in text and response.status_code == 200 else ''}"


_SAID: deque[tuple[str, bytes, bytes]] = deque(maxlen=200)  # the model, sealed text, and the ids beside it


def message(model: str, fields: Fields, draw: random.Random) -> Any:
    """A ModelInferRequest with these fields; lists of texts and ids are a row."""
    made = service_pb2.ModelInferRequest(
        model_name=model, id=draw.choice(("", "1", "2", f"{draw.getrandbits(128):032x}"))
    )
    if draw.random() < 0.3:
        made.parameters["stop_key"].string_param = draw.choice(("", "x", "1"))
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        dtype, code = DTYPES.get(name, ("BYTES", "") if isinstance(values[0], str | bytes) else ("INT32", "i"))
        raws = [v.encode("utf-8", "surrogatepass") if isinstance(v, str) else v for v in values]
        joined = b"".join(
            struct.pack("<I", len(v)) + v if dtype == "BYTES" else struct.pack(f"<{code}", v) for v in raws
        )
        made.inputs.add(name=name, datatype=dtype, shape=(1, len(values)))
        made.raw_input_contents.append(joined)
    return made


def replay(draw: random.Random) -> tuple[str, Fields]:
    """An inner model, and what the tokenizer or the engine said before: as it was, changed, or beside other ids."""
    model, sealed, ids = draw.choice(_SAID)
    changed = bytearray(sealed)
    if draw.random() < 0.6:
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.3:
        changed = changed[: draw.randrange(len(changed) + 1)]
    other = ids if draw.random() < 0.6 else draw.choice(_SAID)[2]
    row = list(struct.unpack(f"<{len(other) // 4}i", other)) or [0]
    if model == f"{NAME}-tokenizer":
        return f"{NAME}-engine", {"input_ids": row, "prompt_info": bytes(changed), "max_tokens": 3, "stream": True}
    return f"{NAME}-detokenizer", {"output_ids": row, "progress": bytes(changed)}


def inner(draw: random.Random) -> tuple[str, Fields]:
    """A direct call of an inner model."""
    if _SAID and draw.random() < 0.6:
        return replay(draw)
    prompt: Fields = {"input_ids": [draw.randrange(49152) for _ in range(draw.choice((1, 5, 300)))]}
    return draw.choice(
        (
            (f"{NAME}-tokenizer", {"text_input": draw.choice(WORDS)}),
            (f"{NAME}-tokenizer", {"messages": chat(draw)["messages"]}),
            (f"{NAME}-engine", {**prompt, **numbers(draw), "max_tokens": 3}), (f"{NAME}-engine", {"stop": True}),
            (f"{NAME}-engine", {**prompt, **guide(draw)}), (f"{NAME}-engine", {"describe": True}),
        )
    )  # fmt: skip


def send_grpc(channel: Any, draw: random.Random) -> str:
    """Send one request on a stream of its own; some are given up."""
    model, fields = inner(draw) if draw.random() < 0.5 else (NAME, crafted(draw))
    call = channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        service_pb2.ModelInferRequest.SerializeToString,
        service_pb2.ModelStreamInferResponse.FromString,
    )(iter([message(model, fields, draw)]), timeout=TIMEOUT_S)
    try:
        if draw.random() < 0.2:
            time.sleep(draw.random() * 0.1)
            call.cancel()
            return "given up"
        answers = list(call)
    except grpc.RpcError as error:
        return str(error.code().name)
    for answer in answers:
        _SAID.extend((model, sealed, ids) for sealed, ids in _sealed(answer.infer_response))
    return f"{model.removeprefix(NAME)} {'error' if any(a.error_message for a in answers) else 'answer'}".strip()


def _sealed(response: Any) -> Iterator[tuple[bytes, bytes]]:
    """What inner models pass on: the sealed text, and the ids that it holds for."""
    said = {output.name: raw for output, raw in zip(response.outputs, response.raw_output_contents, strict=False)}
    for text, ids in (("prompt_info", "input_ids"), ("progress", "output_ids")):
        if len(said.get(text, b"")) > 4:
            yield said[text][4:], said.get(ids, b"")
