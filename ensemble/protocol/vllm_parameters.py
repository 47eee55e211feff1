"""vLLM's `sampling_parameters`, the JSON of its SamplingParams → the fields of this project's options.

Keys, defaults and the numbers that come as texts are those of Triton's vllm_backend. A key that isn't here may have the
value that changes nothing; any other value, and any unknown key, is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_triton.ensemble.protocol.request_options import NO_END_ID

NAME = "sampling_parameters"
DEFAULTS = {"temperature": 1.0, "max_tokens": 16}  # vLLM's, where they aren't this project's

# vLLM's key → the field of SamplingParams or RequestOptions, and what reads its value.
NUMBERS: dict[str, tuple[str, type[int] | type[float]]] = {
    "n": ("num_return_sequences", int),
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "seed": ("seed", int),
    "presence_penalty": ("presence_penalty", float),
    "frequency_penalty": ("frequency_penalty", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_tokens": ("max_tokens", int),
    "min_tokens": ("min_tokens", int),
    "logprobs": ("num_log_probs", int),
}
TEXTS = {"stop": "stop_words", "bad_words": "bad_words"}
# What isn't here, and the values that change nothing beside null and nothing at all ("", [], {}).
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stop_token_ids": (),
    "prompt_logprobs": (),
    "detokenize": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "include_stop_str_in_output": (False,),
    "logits_processors": (),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "logit_bias": (),
    "extra_args": (),
    "lora_name": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "best_of": (1,),
}
GUIDES = ("guided_decoding", "structured_outputs")
# The key of a guide → the guide's type here.
GUIDE_TYPES = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "grammar", "json_object": "json"}


class ParameterError(ValueError):
    """A parameter has a value that it can't have; the message is one line for the client."""


def vllm_fields(text: str) -> dict[str, Any]:
    """Field of SamplingParams or RequestOptions → value, for the JSON object `text`.

    Raises:
        ParameterError: it is no JSON object, or a key is unknown or has a value that can't be served.
    """
    values = _object(text, NAME)
    fields: dict[str, Any] = dict(DEFAULTS)
    for key, value in values.items():
        if key in NUMBERS:
            field, kind = NUMBERS[key]
            if value is None:
                fields.pop(field, None)  # null is the default, and for max_tokens no limit
            else:
                fields[field] = _number(key, value, kind)
        elif key in TEXTS:
            fields[TEXTS[key]] = _texts(key, value)
        elif key == "ignore_eos":
            if _flag(key, value):
                fields["end_id"] = NO_END_ID
        elif key in GUIDES:
            fields.update(_guide(key, value))
        elif key not in NEUTRAL:
            raise ParameterError(f"{NAME} has the unknown key {key!r}; leave it out")
        elif value and not any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL[key]):
            raise ParameterError(f"{NAME} has {key} = {json.dumps(value)[:40]}, which isn't here; leave it out")
        elif value is False and False not in NEUTRAL[key]:
            raise ParameterError(f"{NAME} has {key} = false, which isn't here; leave it out")
    if fields.get("top_k", 0) < 0:
        fields["top_k"] = 0  # vLLM's -1: all
    return fields


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ParameterError(f"{what} is {text[:40]!r}, must be a JSON object")
    return values


def _number(key: str, value: Any, kind: type[int] | type[float]) -> int | float:
    try:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            number = kind(value)
            if kind is float or isinstance(value, str) or number == value:
                return number
    except (ValueError, OverflowError):
        pass
    raise ParameterError(
        f"{NAME} has {key} = {json.dumps(value)[:40]}, must be {'an integer' if kind is int else 'a number'}"
    )


def _flag(key: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ParameterError(f"{NAME} has {key} = {json.dumps(value)[:40]}, must be true or false")


def _texts(key: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ParameterError(f"{NAME} has {key} = {json.dumps(value)[:40]}, must be a text or a list of texts")
    return tuple(text for text in texts if text)


def _guide(key: str, value: Any) -> Mapping[str, str]:
    """The guide's two fields; nothing for a guide of which nothing is set."""
    given = _object(value, f"{NAME}'s {key}") if isinstance(value, str) else value or {}
    if not isinstance(given, dict):
        raise ParameterError(f"{NAME} has {key} = {json.dumps(value)[:40]}, must be an object")
    asked = {name: guide for name, guide in given.items() if guide not in (None, False, "", [])}
    chosen = [name for name in asked if name in GUIDE_TYPES]
    unknown = [name for name in asked if name not in GUIDE_TYPES]
    if unknown or len(chosen) > 1:
        raise ParameterError(f"{NAME} has {key} with {sorted(asked)}, must have one of {sorted(GUIDE_TYPES)}")
    if not chosen:
        return {}
    name, guide = chosen[0], asked[chosen[0]]
    to_text: Callable[[Any], str] = str if isinstance(guide, str) else json.dumps
    return {"guide_type": GUIDE_TYPES[name], "guide": "" if name == "json_object" else to_text(guide)}
