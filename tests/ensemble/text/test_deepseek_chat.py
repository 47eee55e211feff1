"""Chats of V2, V3, R1 and V3.1: the prompt's text and ids by their templates, and what is read of their answers.

The templates are written after the published ones (tests/support/chat_templates.py); each expected text is the
published form, and jinja2 itself must give it too. Ids are those of DeepSeek's own tokenizer.json, which V3, R1 and
V3.1 share.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jinja2
import pytest

from deepseek_triton.ensemble.artefacts.tokenizer_files import read_tokenizer_files
from deepseek_triton.ensemble.text.channels import ChannelSplitter
from deepseek_triton.ensemble.text.chat import ChatTemplate
from deepseek_triton.ensemble.text.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.support import chat_templates
from tests.support.real_tokenizers import deepseek_directory

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TEMPLATES = {
    "V2": chat_templates.DEEPSEEK_V2,
    "V3": chat_templates.DEEPSEEK_V3,
    "R1": chat_templates.DEEPSEEK_R1,
    "V3.1": chat_templates.DEEPSEEK_V31,
}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Un thé ?"},
    {"role": "assistant", "content": "Oui."},
    {"role": "user", "content": "茶?"},
]
V2_CHAT = f"{BOS}Be brief.\n\nUser: Un thé ?\n\nAssistant: Oui.{EOS}User: 茶?\n\nAssistant:"
V3_CHAT = f"{BOS}Be brief.{USER}Un thé ?{ASSISTANT}Oui.{EOS}{USER}茶?{ASSISTANT}"
V31_CHAT = f"{BOS}Be brief.{USER}Un thé ?{ASSISTANT}</think>Oui.{EOS}{USER}茶?{ASSISTANT}"
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
CALLED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "21 °C"},
]
V3_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"city":"Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
V31_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city":"Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
ANSWERED = "<｜tool▁output▁begin｜>21 °C<｜tool▁output▁end｜>"


@cache
def tokenizer(model: str) -> Tokenizer:
    files = read_tokenizer_files(deepseek_directory())
    return Tokenizer(
        files.backend, bos_token=BOS, eos_token=EOS, add_bos_token=True,
        chat_templates={"default": ChatTemplate(TEMPLATES[model])},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "messages", "options", "expected"),
    [
        ("V2", CHAT, {}, V2_CHAT),
        ("V3", CHAT, {}, V3_CHAT),
        ("R1", CHAT, {}, V3_CHAT + "<think>\n"),
        ("V3.1", CHAT, {}, V31_CHAT + "</think>"),
        ("V3.1", CHAT, {"thinking": True}, V31_CHAT + "<think>"),
        ("V3.1", CHAT, {"thinking": False}, V31_CHAT + "</think>"),
        ("V3", CALLED, {}, f"{BOS}{USER}Weather?{ASSISTANT}{V3_CALL}{EOS}{ANSWERED}"),
        ("R1", CALLED, {}, f"{BOS}{USER}Weather?{ASSISTANT}{V3_CALL}{EOS}{ANSWERED}"),
        ("V3.1", CALLED, {}, f"{BOS}{USER}Weather?{ASSISTANT}</think>{V31_CALL}{EOS}{ANSWERED}"),
        ("V3.1", CALLED, {"thinking": True}, f"{BOS}{USER}Weather?{ASSISTANT}</think>{V31_CALL}{EOS}{ANSWERED}"),
    ],
)
def test_the_prompt_of_a_chat(model: str, messages: list[Any], options: dict[str, Any], expected: str) -> None:
    variables = {"bos_token": BOS, "eos_token": EOS, "add_generation_prompt": True, **options}
    assert jinja2.Template(TEMPLATES[model]).render(messages=messages, **variables) == expected
    request = json.dumps({"messages": messages, "chat_template_kwargs": options})
    prompt = tokenizer(model).chat_prompt(request)
    assert prompt.text.replace(prompt.mark or "\0", "") == expected
    ids = tokenizer(model).encode_messages(request)
    assert tokenizer(model).text_of(ids) == expected
    begin, end = (tokenizer(model).token_id(token) for token in (BOS, EOS))
    assert ids.tolist().count(begin) == 1 and ids[0] == begin, "the template's own BOS, and no second one"
    assert ids.tolist().count(end) == expected.count(EOS)
    for token in (USER, ASSISTANT):
        assert ids.tolist().count(tokenizer(model).token_id(token)) == expected.count(token)


@pytest.mark.parametrize(
    ("model", "enable_thinking", "ends", "is_open"),
    [
        ("V3.1", None, "</think>", False), ("V3.1", True, "<think>", True), ("V3.1", False, "</think>", False),
        ("R1", None, "<think>\n", True), ("V2", None, "Assistant:", None), ("V3", None, ASSISTANT, None),
    ],
)  # fmt: skip
def test_thinking_is_switched_by_the_option(
    model: str, enable_thinking: bool | None, ends: str, is_open: bool | None
) -> None:
    prompt = tokenizer(model).chat_prompt(json.dumps(CHAT), enable_thinking)
    assert prompt.text.replace(prompt.mark or "\0", "").endswith(ends)
    assert prompt.is_reasoning_open is is_open


@pytest.mark.parametrize(
    ("model", "answer", "reasoning", "text", "calls"),
    [
        ("V3", f"Let me see.{V3_CALL}", "", "Let me see.", 1),
        ("R1", f"Paris, then.\n</think>\n\nLook:{V3_CALL}", "Paris, then.", "Look:", 1),
        ("V3.1", f"Hm.</think>Look:{V31_CALL}", "Hm.", "Look:", 1),
        ("V3.1", f"Hm.</think>{V31_CALL}", "Hm.", "", 1),
        ("R1", "Hm.\n</think>\n\n21 °C", "Hm.", "21 °C", 0),
    ],
)
def test_what_is_read_of_an_answer(model: str, answer: str, reasoning: str, text: str, calls: int) -> None:
    made = tokenizer(model)
    ids = made.encode_continuation(answer).tolist()
    assert made.text_of(ids) == answer
    detokenizer, splitter = IncrementalDetokenizer(made), ChannelSplitter("</think>" in answer, made.tool_format)
    parts = [splitter.push(detokenizer.push([index])) for index in ids]
    parts.append(splitter.push(detokenizer.push([], final=True), final=True))
    assert "".join(part.reasoning for part in parts).strip() == reasoning
    assert "".join(part.text for part in parts).strip() == text
    deltas = [delta for part in parts for delta in part.tool_calls]
    assert [delta.name for delta in deltas if delta.name] == ["weather"] * calls
    assert "".join(delta.arguments for delta in deltas) == '{"city":"Paris"}' * calls
