"""Tools for chat templates that know none, as DeepSeek's: they are told in the system message, in the model's own form.

DeepSeek's model cards and Qwen's templates have these texts. The format of a call is known from the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_triton.ensemble.text.tool_calls.formats import DEEPSEEK, HERMES, ToolFormat

_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
# V3.1's calls, and those of V3 and R1.
_SHORT = f"{_CALL}tool_call_name{_SEP}tool_call_arguments{_CALL_END}"
_FENCED = f"{_CALL}function{_SEP}tool_call_name\n```json\ntool_call_arguments\n```{_CALL_END}"


def with_tools(
    messages: Sequence[dict[str, Any]], tools: Sequence[Any], tool_format: ToolFormat, template: str
) -> tuple[list[dict[str, Any]], str]:
    """The messages, of which the first one is a system message that tells the tools; and what it tells.

    template: the chat template's source, which shows how the model writes its calls.
    """
    functions = [_function(tool) for tool in tools]
    told = _TEXTS[tool_format.name](functions, template)
    first, *others = messages
    if first.get("role") != "system":
        return [{"role": "system", "content": told}, *messages], told
    return [{**first, "content": f"{first.get('content') or ''}\n\n{told}"}, *others], told


def _deepseek(functions: Sequence[dict[str, Any]], template: str) -> str:
    tools = "\n\n".join(
        f"### {function.get('name') or ''}\nDescription: {function.get('description') or ''}\n\n"
        f"Parameters: {_json(function.get('parameters', {}))}"
        for function in functions
    )
    call = _FENCED if "```json" in template else _SHORT
    return (
        f"## Tools\nYou have access to the following tools:\n\n{tools}\n\n"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{_BEGIN}{call}{{additional_tool_calls}}{_END}\n\nWhere:\n\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces"
    )


def _hermes(functions: Sequence[dict[str, Any]], template: str) -> str:
    tools = "\n".join(_json({"type": "function", "function": function}) for function in functions)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{tools}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


_TEXTS: dict[str, Callable[[Sequence[dict[str, Any]], str], str]] = {DEEPSEEK.name: _deepseek, HERMES.name: _hermes}


def _function(tool: Any) -> dict[str, Any]:
    """The function that `tool` declares; a client that calls the model directly may send anything."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function if isinstance(function, dict) else {}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
