"""Tools and tool_choice: which functions the model sees, and what its answer must be where a call is demanded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from deepseek_triton.gateway.apis.wire.validation import Body


class Function(Body):
    """A function's declaration; `parameters` is a JSON schema, absent: it takes none."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function

    def to_template(self) -> dict[str, Any]:
        """The tool as chat templates know it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, **function}}


class FunctionName(Body):
    """The name of a declared function."""

    name: str


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    """Some of the declared tools."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedToolsChoice(Body):
    """A choice among some of the declared tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_tag(value: Any) -> str:
    if not isinstance(value, dict):
        return "<word>"
    return "<allowed>" if value.get("type") == "allowed_tools" else "<named>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<named>")]
    | Annotated[AllowedToolsChoice, Tag("<allowed>")],
    Discriminator(_choice_tag),
]


@dataclass(frozen=True)
class ToolUse:
    """What a request asks of its tools.

    tools: those that the model sees. forced: the functions of which it must call one; empty: it is free.
    """

    tools: tuple[Tool, ...] = ()
    forced: tuple[Function, ...] = ()


def read_tool_use(tools: list[Tool] | None, choice: Any) -> ToolUse:
    """What `tools` and `tool_choice` ask for. Raises `ValueError`."""
    declared = {tool.function.name: tool for tool in tools or ()}
    if len(declared) != len(tools or ()):
        raise ValueError("tools must have different names")
    if choice is None:
        choice = "auto"
    if choice != "none" and choice != "auto" and not declared:
        raise ValueError("tool_choice must come with tools")
    if choice == "none" or not declared:
        return ToolUse()
    if isinstance(choice, AllowedToolsChoice):
        allowed = choice.allowed_tools
        seen = tuple(_find(declared, tool.function.name) for tool in allowed.tools)
        return ToolUse(seen, tuple(tool.function for tool in seen) if allowed.mode == "required" else ())
    if isinstance(choice, NamedTool):
        return ToolUse(tuple(declared.values()), (_find(declared, choice.function.name).function,))
    functions = tuple(tool.function for tool in declared.values())
    return ToolUse(tuple(declared.values()), functions if choice == "required" else ())


def _find(declared: dict[str, Tool], name: str) -> Tool:
    if name not in declared:
        raise ValueError(f"tool_choice must name one of tools, {', '.join(declared)}, got {name!r}")
    return declared[name]
