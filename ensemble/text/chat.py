"""Renders chat messages into a prompt: validates the client's JSON and runs the checkpoint's Jinja template.

It knows the chat formats of OpenAI and Hugging Face; it knows nothing of tokens. ensemble/text/tool_calls/messages.py
converts tool calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_triton.ensemble.text.errors import TextError, TokenizerLoadError, one_line, utf8_text
from deepseek_triton.ensemble.text.reasoning import CLOSE_TAG, OPEN_TAG, opens_reasoning
from deepseek_triton.ensemble.text.tool_calls.formats import ToolFormat, detect_format
from deepseek_triton.ensemble.text.tool_calls.messages import CallForm, check_tool_calls, find_form, has_tool_messages

# The template variable that switches reasoning on or off: Qwen3's name, DeepSeek-V3.1's name.
_THINKING_VARIABLES = ("enable_thinking", "thinking")
_REQUEST_KEYS = ("messages", "tools", "add_generation_prompt", "chat_template_kwargs")


class ChatTemplate:
    """A checkpoint's Jinja chat template, compiled once. It runs in a sandbox, because it is untrusted."""

    def __init__(self, source: str, name: str = "chat_template") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise TokenizerLoadError(f"{name} is not a valid template: {error}") from error
        self.thinking_variable: str | None = next((v for v in _THINKING_VARIABLES if v in variables), None)
        self.has_reasoning = OPEN_TAG in source or CLOSE_TAG in source
        self.tool_format: ToolFormat | None = detect_format(source)

    @property
    def markers(self) -> frozenset[str]:
        """The markers that delimit reasoning and tool calls in this model's text."""
        tags = {OPEN_TAG, CLOSE_TAG} if self.has_reasoning else set()
        return frozenset(tags) if self.tool_format is None else self.tool_format.markers | tags

    def render(self, variables: Mapping[str, Any], enable_thinking: bool | None = None) -> str:
        """Render the prompt from `variables` (messages, add_generation_prompt, tools …).

        `enable_thinking` is passed to the template under the template's own name for it. None leaves the choice to the
        template, or to `variables`.

        Raises:
            TextError: the template rejected the messages, or has no switch for thinking.
        """
        if enable_thinking is not None and self.thinking_variable is not None:
            variables = {**variables, self.thinking_variable: enable_thinking}
        messages = variables.get("messages", ())
        if has_tool_messages(messages):
            variables = {**variables, "messages": self._call_form.shape(messages)}
        prompt = self._render(variables)
        if enable_thinking is not None:
            self._check_thinking(prompt, enable_thinking)
        return prompt

    def _check_thinking(self, prompt: str, is_wanted: bool) -> None:
        if not is_wanted and opens_reasoning(prompt):
            raise TextError("enable_thinking is false, but this model always thinks: its chat template opens <think>")
        if self.thinking_variable is None and not opens_reasoning(prompt):
            raise TextError("enable_thinking is given, but this model's chat template has no such switch: leave it out")

    @cached_property
    def _call_form(self) -> CallForm:
        others = {"tools": None, "documents": None, "add_generation_prompt": False, "bos_token": "", "eos_token": ""}
        return find_form(lambda messages: self._render({**others, "messages": messages}))

    def _render(self, variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render(variables)
        except Exception as error:  # the template runs on the client's data, so every error is the client's
            raise TextError(f"the model's chat template refused the messages: {one_line(error)}") from error


def parse_messages(messages_json: str | bytes) -> dict[str, Any]:
    """Validate the client's JSON and return the template's variables (transformers' names; None where absent).

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
    for key, kind, name in (("tools", list, "list"), ("chat_template_kwargs", dict, "object")):
        if not isinstance(request.get(key) or kind(), kind):
            raise TextError(f"{key} must be a JSON {name}")
    return {
        **(request.get("chat_template_kwargs") or {}),
        "messages": [_message(message, f"messages[{i}]") for i, message in enumerate(request["messages"])],
        "tools": request.get("tools") or None,
        "documents": None,
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


class _GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks the assistant's text for training. It renders its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML; models are trained on JSON without such escapes.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
