"""Tools are told to a model whose chat template knows none, or refused; they are never dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.ensemble.text.channels import ChannelSplitter
from deepseek_triton.ensemble.text.errors import TextError
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.ensemble.text.test_text import write_files
from tests.support import chat_templates

ASK: list[dict[str, Any]] = [{"role": "user", "content": "Is it warm?"}]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a <｜tool▁sep｜>", "parameters": {"a": 1}}},
    {"type": "function", "function": {"name": "time"}},
]
SPECIALS = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
]


def prompt(tmp_path: Path, template: str, messages: list[dict[str, Any]], tools: Any = TOOLS) -> tuple[str, list[str]]:
    """The prompt, and its special tokens."""
    tokenizer = Tokenizer.from_directory(write_files(tmp_path, template=template, specials=SPECIALS))
    made = tokenizer.chat_prompt(json.dumps({"messages": messages, "tools": tools}))
    assert made.has_tools
    ids = tokenizer.encode_prompt(made)
    by_id = {tokenizer.token_id(name): name for name in SPECIALS}
    return made.text.replace(made.mark or "\0", ""), [by_id[token] for token in ids.tolist() if token in by_id]


@pytest.mark.parametrize("template", [chat_templates.DEEPSEEK_R1, chat_templates.DEEPSEEK_V31], ids=["R1", "V3.1"])
def test_deepseeks_form_in_the_system_message(tmp_path: Path, template: str) -> None:
    text, specials = prompt(tmp_path, template, ASK)
    assert '### weather\nDescription: Of a <｜tool▁sep｜>\n\nParameters: {"a": 1}' in text and "### time\n" in text
    assert text.index("## Tools") < text.index("Is it warm?")
    # The form's own markers are tokens; what the client wrote is text.
    order = [SPECIALS[0], SPECIALS[2], SPECIALS[4], SPECIALS[3], SPECIALS[1]]
    assert specials == order
    text, _ = prompt(tmp_path, template, [{"role": "system", "content": "Be brief"}, *ASK])
    assert "Be brief\n\n## Tools" in text


@pytest.mark.parametrize("template", [chat_templates.DEEPSEEK_R1, chat_templates.DEEPSEEK_V31], ids=["R1", "V3.1"])
def test_a_call_in_the_form_that_is_told_is_read(tmp_path: Path, template: str) -> None:
    text, _ = prompt(tmp_path, template, ASK)
    form = text[text.index("<｜tool▁calls▁begin｜>") : text.index("<｜tool▁calls▁end｜>")] + "<｜tool▁calls▁end｜>"
    call = form.replace("tool_call_name", "weather").replace("tool_call_arguments", '{"a": 1}')
    call = call.replace("{additional_tool_calls}", "")
    tokenizer = Tokenizer.from_directory(tmp_path)
    (delta,) = ChannelSplitter(None, tokenizer.tool_format).push(call, final=True).tool_calls
    assert (delta.as_openai()["function"]["name"], delta.as_openai()["function"]["arguments"]) == (
        "weather",
        '{"a": 1}',
    )


def test_hermes_form(tmp_path: Path) -> None:
    text, _ = prompt(tmp_path, chat_templates.QWEN25, ASK)
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text


@pytest.mark.parametrize(
    "tools", [[{"type": "function"}], [{"function": 5}], [5], [{"function": {"description": None}}]]
)
def test_malformed_tools_are_told_as_well_as_they_can_be(tmp_path: Path, tools: Any) -> None:
    assert "### " in prompt(tmp_path, chat_templates.DEEPSEEK_V31, ASK, tools)[0]


def test_a_template_that_shows_neither_refuses_tools(tmp_path: Path) -> None:
    blind = chat_templates.DEEPSEEK_V31.replace("message['role'] == 'system'", "false")
    with pytest.raises(TextError, match="tools are given, but this model's chat template shows neither"):
        prompt(tmp_path, blind, ASK)
    plain = Tokenizer.from_directory(write_files(tmp_path, template=chat_templates.PLAIN))
    with pytest.raises(TextError, match="tools are given, but this model's chat template knows none"):
        plain.chat_prompt(json.dumps({"messages": ASK, "tools": TOOLS}))
