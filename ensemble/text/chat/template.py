"""A checkpoint's Jinja chat template: what it needs to know, and prompts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jinja2
import jinja2.nodes

from deepseek_triton.ensemble.text.chat.control_tokens import NO_CONTROL_TOKENS, ControlTokens, unescape
from deepseek_triton.ensemble.text.chat.environment import find_variables, make_environment
from deepseek_triton.ensemble.text.chat.renderer import DEFAULT_LIMITS, RenderError, RenderLimits, render
from deepseek_triton.ensemble.text.chat.told_tools import with_tools
from deepseek_triton.ensemble.text.errors import TextError, TokenizerLoadError
from deepseek_triton.ensemble.text.reasoning import CLOSE_TAG, OPEN_TAG, opens_reasoning
from deepseek_triton.ensemble.text.tool_calls.formats import ToolFormat, detect_format
from deepseek_triton.ensemble.text.tool_calls.messages import CallForm, find_form, has_tool_messages

# The template variable that switches reasoning on or off: Qwen3's name, DeepSeek-V3.1's name.
_THINKING_VARIABLES = ("enable_thinking", "thinking")


class ChatTemplate:
    """A checkpoint's Jinja chat template, which runs in a sandbox and under limits, because it is untrusted."""

    def __init__(self, source: str, name: str = "chat_template") -> None:
        self._source = source
        environment = make_environment()
        try:
            parsed = environment.parse(source)  # compiling it would compute its constants, which may take for ever
            variables = find_variables(parsed, environment)
        except jinja2.TemplateError as error:
            raise TokenizerLoadError(f"{name} is not a valid template: {error}") from error
        known = {jinja2.nodes.Filter: ("filter", environment.filters), jinja2.nodes.Test: ("test", environment.tests)}
        for kind, (word, names) in known.items():
            if missing := sorted({node.name for node in parsed.find_all(kind)} - set(names)):
                raise TokenizerLoadError(f"{name} is not a valid template: No {word} named {missing[0]!r}.")
        self.thinking_variable: str | None = next((v for v in _THINKING_VARIABLES if v in variables), None)
        self.knows_tools = "tools" in variables
        self.has_reasoning = OPEN_TAG in source or CLOSE_TAG in source
        self.tool_format: ToolFormat | None = detect_format(source)

    @property
    def markers(self) -> frozenset[str]:
        """The markers that delimit reasoning and tool calls in this model's text."""
        tags = {OPEN_TAG, CLOSE_TAG} if self.has_reasoning else set()
        return frozenset(tags) if self.tool_format is None else self.tool_format.markers | tags

    def render(self, variables: Mapping[str, Any], enable_thinking: bool | None = None) -> str:
        """Render the prompt from `variables` as `render_protected`, with the control tokens in the client's texts."""
        return self.render_protected(variables, enable_thinking, NO_CONTROL_TOKENS)[0]

    def render_protected(
        self,
        variables: Mapping[str, Any],
        enable_thinking: bool | None,
        control_tokens: ControlTokens,
        limits: RenderLimits = DEFAULT_LIMITS,
        own: Mapping[str, str] | None = None,
    ) -> tuple[str, str | None]:
        """Render the prompt from the client's `variables` (messages, add_generation_prompt, tools …).

        `own` are the tokenizer's special tokens, where `variables` has no other value for them.

        `enable_thinking` is passed to the template under the template's own name for it. None leaves the choice to the
        template, or to `variables`. Returns the prompt, and the mark that breaks `control_tokens` in the client's
        texts; None if they hold none.

        Raises:
            TextError: the template rejected the messages, or has no switch for thinking.
        """
        if enable_thinking is not None and self.thinking_variable is not None:
            variables = {**variables, self.thinking_variable: enable_thinking}
        messages = variables.get("messages", ())
        if has_tool_messages(messages):
            variables = {**variables, "messages": self._call_form.shape(messages)}
        protected = control_tokens.protect(variables)
        given, told = self._tell_tools(protected.variables)
        prompt = self._render({**(own or {}), **given}, limits)
        if told not in prompt:
            raise TextError("tools are given, but this model's chat template shows neither them nor a system message")
        if protected.mark is not None:
            prompt = unescape(prompt, protected.mark)
        if enable_thinking is not None:
            self._check_thinking(prompt, enable_thinking)
        return prompt, protected.mark

    def _tell_tools(self, variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """The variables with the tools in the system message, where the template shows none itself; and their text."""
        if not variables.get("tools") or not variables.get("messages") or self.knows_tools or self.tool_format is None:
            return variables, ""
        messages, told = with_tools(variables["messages"], variables["tools"], self.tool_format, self._source)
        return {**variables, "messages": messages}, told

    def _check_thinking(self, prompt: str, is_wanted: bool) -> None:
        if not is_wanted and opens_reasoning(prompt):
            raise TextError("enable_thinking is false, but this model always thinks: its chat template opens <think>")
        if self.thinking_variable is None and not opens_reasoning(prompt):
            raise TextError("enable_thinking is given, but this model's chat template has no such switch: leave it out")

    @cached_property
    def _call_form(self) -> CallForm:
        others = {"tools": None, "documents": None, "add_generation_prompt": False, "bos_token": "", "eos_token": ""}
        return find_form(lambda messages: self._render({**others, "messages": messages}))

    def _render(self, variables: Mapping[str, Any], limits: RenderLimits = DEFAULT_LIMITS) -> str:
        try:
            return render(self._source, variables, limits)
        except RenderError as error:
            raise TextError(f"the model's chat template refused the messages: {error}") from error
