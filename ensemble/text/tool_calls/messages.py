"""Converts tool calls in chat messages from OpenAI's form to the form that a chat template expects.

In OpenAI's form a call's arguments are a JSON string (an object is accepted too). This module knows nothing of tokens.

Templates differ: DeepSeek's concatenate the arguments as a string, Qwen 2.5's and Llama's serialise an object (and
would quote a string), Qwen 3's accept both, Qwen3-Coder's iterate over an object; R1's renders calls only if the
content is null. So each template is probed once with a known call. A string is preferred: the prompt then repeats the
model's own characters, and a cached prefix stays valid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from deepseek_triton.ensemble.text.errors import TextError

ChatMessage = dict[str, Any]
Render = Callable[[Sequence[ChatMessage]], str]


def check_tool_calls(message: ChatMessage, where: str) -> None:
    """Validate the tool fields of one message.

    Raises:
        TextError: a field is not in OpenAI's form; `where` and the field's path name it.
    """
    _check(message.get("tool_call_id"), str, f"{where}.tool_call_id must be a string")
    calls = message.get("tool_calls")
    if calls is None:
        return
    _check(calls, list, f"{where}.tool_calls must be a list")
    for index, call in enumerate(calls):
        path = f"{where}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise TextError(f'{path} must be {{"type": "function", "function": {{"name": "...", "arguments": "..."}}}}')
        _check(call.get("id"), str, f"{path}.id must be a string")
        _check(
            function.get("arguments"), str | dict, f"{path}.function.arguments must be a string of JSON or an object"
        )


@dataclass(frozen=True)
class CallForm:
    """The form in which a template expects an assistant's calls.

    is_object: the arguments are an object, not a JSON string.
    empty_content: the content of a message that has calls and no text.
    is_apart: text goes into a message before the calls', because the template drops the calls of a message with text.
    """

    is_object: bool
    empty_content: str | None
    is_apart: bool = False

    def shape(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Return the messages in this form. A tool message without a name gets the name from its call."""
        calls = [call for message in messages for call in _calls(message)]
        names = {call["id"]: call["function"]["name"] for call in calls if call.get("id")}
        return [shaped for message in messages for shaped in self._shape(message, names)]

    def _shape(self, message: ChatMessage, names: dict[str, str]) -> Iterator[ChatMessage]:
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message = {**message, "name": names[message["tool_call_id"]]}
        if not (calls := _calls(message)):
            yield message
            return
        content = message.get("content") or self.empty_content
        if self.is_apart and content:
            yield {key: value for key, value in message.items() if key != "tool_calls"}
            content = self.empty_content
        yield {**message, "content": content, "tool_calls": [self._shape_call(call) for call in calls]}

    def _shape_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = function.get("arguments") or {}
        if self.is_object and isinstance(arguments, str):
            arguments = _as_object(arguments)
        elif not self.is_object and isinstance(arguments, dict):
            arguments = _as_string(arguments)
        return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def find_form(render: Render) -> CallForm:
    """Return the form in which the template behind `render` shows a call; the most common form if it shows none."""
    rendered = [(form, _try(render, form, "")) for form in _FORMS]
    for sign in (_is_whole, _is_named):
        for form, text in rendered:
            if sign(text):
                is_apart = not sign(_try(render, form, "text"))
                return CallForm(form.is_object, form.empty_content, is_apart)
    return _FORMS[0]


def has_tool_messages(messages: Sequence[ChatMessage]) -> bool:
    """Is there anything here for a `CallForm` to shape?"""
    return any(message["role"] == "tool" or _calls(message) for message in messages)


_FORMS: Final = tuple(CallForm(is_object, content) for content in (None, "") for is_object in (False, True))
_NAME, _ARGUMENTS = "a_tool", '{"an_argument": 1}'


def _try(render: Render, form: CallForm, content: str) -> str:
    call = {"id": "call_0", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    question = {"role": "user", "content": "Hi"}
    try:
        return render(form.shape([question, {"role": "assistant", "content": content, "tool_calls": [call]}]))
    except TextError:
        return ""


def _is_whole(text: str) -> bool:
    return _NAME in text and "".join(_ARGUMENTS.split()) in "".join(text.split())


def _is_named(text: str) -> bool:
    return _NAME in text


def _calls(message: ChatMessage) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = message.get("tool_calls") or []
    return calls


def _check(value: Any, kind: Any, error: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise TextError(error)


def _as_string(arguments: dict[str, Any]) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except RecursionError as error:
        raise TextError("a tool call's arguments are nested too deeply: send them as a string of JSON") from error


def _as_object(arguments: str) -> Any:
    # Invalid JSON from the model stays a string: it must not make the rest of the chat unusable.
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments
