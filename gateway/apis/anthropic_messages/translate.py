"""A body → the request to a backend."""

from __future__ import annotations

from typing import Any

from deepseek_triton.clients import GenerateRequest
from deepseek_triton.gateway.apis.anthropic_messages.blocks import text_of
from deepseek_triton.gateway.apis.anthropic_messages.body import CountBody, MessagesBody, ThinkingOn
from deepseek_triton.gateway.apis.openai_chat import tools as functions
from deepseek_triton.gateway.apis.openai_chat.tools import Function, FunctionName, NamedTool, ToolUse, read_tool_use
from deepseek_triton.gateway.apis.openai_chat.translate import EFFORT_BUDGETS, guide
from deepseek_triton.gateway.apis.wire.errors import ApiError

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def message_request(body: MessagesBody) -> GenerateRequest:
    """The request that `body` asks for. Raises `ApiError`."""
    return _request(
        body,
        max_tokens=body.max_tokens,
        stop_words=body.stop_sequences or None,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        thinking_token_budget=_thinking_budget(body),
    )


def count_request(body: CountBody) -> GenerateRequest:
    """The shortest request with the prompt of `body`, which the server's answer counts. Raises `ApiError`."""
    return _request(body, max_tokens=1)


def tool_use_of(body: CountBody) -> ToolUse:
    """What the body asks of its tools. Raises `ApiError`."""
    choice = body.tool_choice
    tools = [_function(tool.name, tool.description, tool.input_schema, tool.strict) for tool in body.tools or ()]
    wanted: Any = None
    if choice is not None:
        name = choice.name
        wanted = CHOICES[choice.type] if name is None else NamedTool(type="function", function=FunctionName(name=name))
    try:
        use = read_tool_use(tools, wanted)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    if choice is not None and choice.disable_parallel_tool_use and use.tools and not use.forced:
        raise ApiError(
            400,
            "tool_choice.disable_parallel_tool_use is not supported with tool_choice 'auto'; leave it out, or demand"
            " one call",
        )
    return use


def _request(body: CountBody, **options: Any) -> GenerateRequest:
    use = tool_use_of(body)
    system = [{"role": "system", "content": text_of(body.system)}] if body.system else []
    form = body.output_config.format if body.output_config else None
    try:
        return GenerateRequest(
            messages=[*system, *(turn for message in body.messages for turn in message.to_turns())],
            tools=[tool.to_template() for tool in use.tools] or None,
            **options,
            **guide(use, "output_config.format", is_json=form is not None, schema=form.schema_ if form else None),
        )
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def _function(name: str, description: str | None, schema: dict[str, Any], strict: bool | None) -> functions.Tool:
    # Anthropic's names may be longer than OpenAI's: they were checked as such.
    function = Function.model_construct(name=name, description=description, parameters=schema, strict=strict)
    return functions.Tool.model_construct(type="function", function=function)


def _thinking_budget(body: CountBody) -> int | None:
    if isinstance(body.thinking, ThinkingOn):
        return body.thinking.budget_tokens
    if body.thinking is not None and body.thinking.type == "disabled":
        return 0
    effort = body.output_config.effort if body.output_config else None
    return EFFORT_BUDGETS[effort] if effort else None
