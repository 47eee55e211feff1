"""Validates a client's chat messages; ensemble/text/tool_calls/messages.py converts tool calls."""

from __future__ import annotations

import json
from typing import Any

from deepseek_triton.ensemble.text.errors import TextError, one_line, utf8_text
from deepseek_triton.ensemble.text.tool_calls.messages import check_tool_calls

# Whether control tokens in the client's own texts become control tokens of the prompt; no template sees it.
PARSE_CONTROL_TOKENS = "parse_control_tokens"
_REQUEST_KEYS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "chat_template_kwargs",
    "chat_template",
    PARSE_CONTROL_TOKENS,
)


def parse_messages(messages_json: str | bytes) -> dict[str, Any]:
    """Validate the client's JSON and return the template's variables (transformers' names; None where absent).

    PARSE_CONTROL_TOKENS is among them, but is no variable of the template.

    Raises:
        TextError: the JSON is malformed; the message names the field.
    """
    text = utf8_text(messages_json, "messages")
    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TextError(f"messages is not JSON: {one_line(error)}") from error
    if isinstance(request, list):
        request = {"messages": request}
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        raise TextError('messages must be a JSON list such as [{"role": "user", "content": "Hello"}]')
    if unknown := sorted(request.keys() - set(_REQUEST_KEYS)):
        raise TextError(f"messages has an unknown key {unknown[0]!r}: known are {', '.join(_REQUEST_KEYS)}")
    if not request["messages"]:
        raise TextError("messages is empty: send at least one message")
    for key, kind, name in (("tools", list, "a JSON list"), ("chat_template_kwargs", dict, "a JSON object"),
                            (PARSE_CONTROL_TOKENS, bool, "true or false")):  # fmt: skip
        if not isinstance(request.get(key) or kind(), kind):
            raise TextError(f"{key} must be {name}")
    template = request.get("chat_template")
    if not isinstance(template, str | None):
        raise TextError("chat_template must be the name of one of the model's chat templates")
    kwargs = request.get("chat_template_kwargs") or {}
    if "chat_template" in kwargs:
        raise TextError("chat_template stands beside messages, not in chat_template_kwargs")
    return {
        **kwargs,
        **({} if template is None else {"chat_template": template}),
        "messages": [_message(message, f"messages[{i}]") for i, message in enumerate(request["messages"])],
        "tools": request.get("tools") or None,
        "documents": None,
        PARSE_CONTROL_TOKENS: bool(request.get(PARSE_CONTROL_TOKENS)),
        "add_generation_prompt": request.get("add_generation_prompt", True),
    }


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise TextError(f"{where} must be an object with role and content")
    if not isinstance(message.get("role"), str):
        raise TextError(f"{where}.role must be a string such as user")
    check_tool_calls(message, where)
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is None and not message.get("tool_calls"):
        raise TextError(f"{where}.content is missing: send a string")
    elif content is not None and not isinstance(content, str):
        raise TextError(f"{where}.content must be a string or a list of text parts")
    # Some templates treat an empty list as calls.
    return {**{key: value for key, value in message.items() if key != "tool_calls" or value}, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise TextError(f'{where} must be {{"type": "text", "text": "..."}}: this model accepts text only')
