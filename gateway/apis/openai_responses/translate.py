"""A response body → the request to a backend, and the response before its first token."""

from __future__ import annotations

import json
import time
from typing import Any
from uuid import uuid4

from deepseek_triton.clients import GenerateRequest
from deepseek_triton.gateway.apis.openai_chat.body import JsonObjectFormat
from deepseek_triton.gateway.apis.openai_chat.tools import (
    AllowedTools,
    AllowedToolsChoice,
    Function,
    FunctionName,
    NamedTool,
    Tool,
    ToolUse,
)
from deepseek_triton.gateway.apis.openai_chat.translate import EFFORT_BUDGETS, checked_tool_use, guide
from deepseek_triton.gateway.apis.openai_responses.body import AllowedChoice, ChosenTool, ResponseBody, SchemaFormat
from deepseek_triton.gateway.apis.openai_responses.items import Turn, turns_of
from deepseek_triton.gateway.apis.wire.errors import invalid
from deepseek_triton.gateway.apis.wire.sampling import stop_words


def input_turns(body: ResponseBody) -> list[Turn]:
    """The input's messages, without instructions and earlier turns."""
    return [{"role": "user", "content": body.input}] if isinstance(body.input, str) else turns_of(body.input)


def response_request(body: ResponseBody, turns: list[Turn], tool_use: ToolUse) -> GenerateRequest:
    """The request that `body` asks for; turns: of the whole conversation. Raises `ApiError`."""
    instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    effort = body.reasoning.effort if body.reasoning else None
    try:
        return GenerateRequest(
            messages=[*instructions, *turns],
            tools=[tool.to_template() for tool in tool_use.tools] or None,
            chat_template_kwargs=body.chat_template_kwargs,
            max_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            min_tokens=body.min_tokens,
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            repetition_penalty=body.repetition_penalty,
            seed=None if body.seed is None else body.seed % 2**64,
            stop_words=stop_words(body.stop),
            priority=body.priority,
            return_log_probs=True if body.has_log_probs else None,
            num_top_log_probs=body.top_logprobs or None,
            thinking_token_budget=None if effort is None else EFFORT_BUDGETS[effort],
            **_guide(body, tool_use),
        )
    except ValueError as error:
        raise invalid(str(error)) from None


def tool_use_of(body: ResponseBody) -> ToolUse:
    """What the body asks of its tools. Raises `ApiError`."""
    tools = [Tool(type="function", function=Function(**_declaration(tool))) for tool in body.tools or ()]
    choice: Any = body.tool_choice
    if isinstance(choice, ChosenTool):
        choice = _named(choice)
    elif isinstance(choice, AllowedChoice):
        allowed = AllowedTools(mode=choice.mode, tools=[_named(tool) for tool in choice.tools])
        choice = AllowedToolsChoice(type="allowed_tools", allowed_tools=allowed)
    return checked_tool_use(tools, choice, body.parallel_tool_calls)


def begun_response(body: ResponseBody) -> dict[str, Any]:
    """The response object before its first token."""
    form = body.text.format if body.text else None
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": bool(body.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": _dumped(body.tool_choice) or "auto",
        "tools": [{"parameters": None, "strict": None, **_dumped(tool)} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def input_items(body: ResponseBody, response_id: str) -> list[dict[str, Any]]:
    """The input as the API lists it: each item with an id, texts as parts."""
    given: list[dict[str, Any]] = (
        [{"type": "message", "role": "user", "content": body.input}]
        if isinstance(body.input, str)
        else [item.model_dump(exclude_none=True, warnings=False) for item in body.input]
    )
    items = []
    for index, item in enumerate(given):
        if item["type"] == "message":
            kind = "output_text" if item["role"] == "assistant" else "input_text"
            if isinstance(item["content"], str):
                item = {**item, "content": [{"type": kind, "text": item["content"]}]}
            item = {"status": "completed", **item}
        items.append({"id": f"msg_{response_id.removeprefix('resp_')}_{index}", **item})
    return json.loads(json.dumps(items))  # type: ignore[no-any-return]


def _guide(body: ResponseBody, tool_use: ToolUse) -> dict[str, Any]:
    form = body.text.format if body.text else None
    if isinstance(form, SchemaFormat):
        return guide(tool_use, "text.format", is_json=True, schema=form.schema_)
    return guide(tool_use, "text.format", is_json=isinstance(form, JsonObjectFormat))


def _declaration(tool: Any) -> dict[str, Any]:
    return {name: value for name, value in _dumped(tool).items() if name != "type"}


def _named(tool: ChosenTool) -> NamedTool:
    return NamedTool(type="function", function=FunctionName(name=tool.name))


def _dumped(value: Any) -> Any:
    return value.model_dump(by_alias=True, exclude_none=True) if hasattr(value, "model_dump") else value
