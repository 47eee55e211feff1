"""A chat body → the request to a backend."""

from __future__ import annotations

from typing import Any

from deepseek_triton.clients import GenerateRequest
from deepseek_triton.gateway.apis.openai_chat.body import (
    ChatBody,
    JsonObjectFormat,
    JsonSchemaFormat,
    ReasoningEffort,
)
from deepseek_triton.gateway.apis.openai_chat.tools import Function, Tool, ToolUse, read_tool_use
from deepseek_triton.gateway.apis.wire.errors import ApiError
from deepseek_triton.gateway.apis.wire.sampling import make_request

# The reasoning tokens of each effort; None: no limit. Those of low, medium and high are the numbers that Google's
# OpenAI-compatible API publishes.
EFFORT_BUDGETS: dict[ReasoningEffort, int | None] = {
    "none": 0,
    "minimal": 256,
    "low": 1024,
    "medium": 8192,
    "high": 24576,
    "xhigh": None,
    "max": None,
}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def chat_request(body: ChatBody) -> GenerateRequest:
    """The request that `body` asks for. Raises `ApiError`."""
    tool_use = tool_use_of(body)
    return make_request(
        body,
        messages=[message.to_turn() for message in body.messages],
        tools=[tool.to_template() for tool in tool_use.tools] or None,
        chat_template_kwargs=body.chat_template_kwargs,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        return_log_probs=True if body.logprobs else None,
        num_top_log_probs=body.top_logprobs or None,
        thinking_token_budget=_thinking_budget(body),
        **_guide(body, tool_use),
    )


def tool_use_of(body: ChatBody) -> ToolUse:
    """What the body asks of its tools. Raises `ApiError`."""
    return checked_tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)


def checked_tool_use(tools: list[Tool] | None, choice: Any, parallel: bool | None) -> ToolUse:
    """`read_tool_use`, of which errors are the client's. Raises `ApiError`."""
    try:
        tool_use = read_tool_use(tools, choice)
    except ValueError as error:
        raise ApiError(400, str(error), param=str(error).split()[0]) from None
    if parallel is False and tool_use.tools and not tool_use.forced:
        raise ApiError(
            400,
            "parallel_tool_calls: false is not supported with tool_choice 'auto'; leave it out, or demand one call",
            param="parallel_tool_calls",
        )
    return tool_use


def _thinking_budget(body: ChatBody) -> int | None:
    if body.reasoning_effort is None:
        return body.thinking_token_budget
    return EFFORT_BUDGETS[body.reasoning_effort]


def _guide(body: ChatBody, tool_use: ToolUse) -> dict[str, Any]:
    form = body.response_format
    if isinstance(form, JsonSchemaFormat):
        return guide(tool_use, "response_format", is_json=True, schema=form.json_schema.schema_)
    return guide(tool_use, "response_format", is_json=isinstance(form, JsonObjectFormat))


def guide(tool_use: ToolUse, param: str, *, is_json: bool, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the answer's text must be: a call of a function that is demanded, or JSON, of `schema` if there is one.

    param: the field that asks for JSON. Raises `ApiError` where both are demanded.
    """
    if tool_use.forced:
        if is_json:
            raise ApiError(400, f"{param} must not come with a tool_choice that demands a call", param=param)
        return {"guide_type": "json_schema", "guide": call_schema(tool_use.forced)}
    if schema is not None:
        return {"guide_type": "json_schema", "guide": schema}
    return {"guide_type": "json"} if is_json else {}


def call_schema(functions: tuple[Function, ...]) -> dict[str, Any]:
    """The schema of an answer that calls one of `functions`: its arguments, or, of several, an object with a name."""
    if len(functions) == 1:
        return functions[0].parameters or NO_ARGUMENTS
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": function.parameters or NO_ARGUMENTS},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return {"anyOf": calls}
