"""Clients' tool messages in each template's form, and thinking switched on and off."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.ensemble.text.chat import ChatTemplate, parse_messages
from deepseek_triton.ensemble.text.errors import TextError
from deepseek_triton.ensemble.text.reasoning import opens_reasoning
from tests.support import chat_templates

USER = {"role": "user", "content": "Weather?"}
ARGUMENTS = '{"city":"Paris"}'  # as a model wrote it: other spaces than json.dumps'
REWRITTEN = '{"city": "Paris"}'


def assistant(content: str | None = None, arguments: Any = ARGUMENTS) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


ANSWER = {"role": "tool", "tool_call_id": "call_1", "content": "21 °C"}


def render(template: str, *messages: dict[str, Any], **options: Any) -> str:
    variables = parse_messages(json.dumps({"messages": messages, **options}))
    return ChatTemplate(template).render({**variables, "bos_token": "", "eos_token": ""})


V31_CALL = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
V3_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)
QWEN_CALL = '\n<tool_call>\n{{"name": "weather", "arguments": {}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "from_string", "from_object"),
    [
        (chat_templates.DEEPSEEK_R1, V3_CALL.format(ARGUMENTS), V3_CALL.format(REWRITTEN)),
        (chat_templates.DEEPSEEK_V31, V31_CALL.format(ARGUMENTS), V31_CALL.format(REWRITTEN)),
        (chat_templates.QWEN25, QWEN_CALL.format(REWRITTEN), QWEN_CALL.format(REWRITTEN)),
        (chat_templates.QWEN3, QWEN_CALL.format(ARGUMENTS), QWEN_CALL.format(REWRITTEN)),
        (
            chat_templates.HERMES,
            f'<tool_call>\n{{"arguments": {REWRITTEN}, "name": "weather"}}\n</tool_call>',
            f'<tool_call>\n{{"arguments": {REWRITTEN}, "name": "weather"}}\n</tool_call>',
        ),
        (
            chat_templates.QWEN3_CODER,
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_calls_reach_the_template(template: str, from_string: str, from_object: str, content: str | None) -> None:
    assert from_string in render(template, USER, assistant(content), ANSWER)
    assert from_object in render(template, USER, assistant(content, json.loads(ARGUMENTS)), ANSWER)
    assert "21 °C" in render(template, USER, assistant(content), ANSWER)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (chat_templates.DEEPSEEK_V31, "</think>I'll look." + V31_CALL.format(ARGUMENTS)),
        (chat_templates.QWEN3, "assistant\nI'll look." + QWEN_CALL.format(ARGUMENTS)),
        # R1's template would write the text alone: two turns keep both.
        (
            chat_templates.DEEPSEEK_R1,
            "<｜Assistant｜>I'll look.<｜end▁of▁sentence｜><｜Assistant｜>" + V3_CALL.format(ARGUMENTS),
        ),
    ],
)
def test_text_beside_calls_is_kept(template: str, expected: str) -> None:
    assert expected in render(template, USER, assistant("I'll look."), ANSWER)


def test_several_calls_and_their_answers() -> None:
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in "ab"]
    answers = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in "ab"]
    prompt = render(chat_templates.HERMES, USER, {"role": "assistant", "tool_calls": calls}, *answers)
    assert '{"name": "a", "content": "of a"}' in prompt and '{"name": "b", "content": "of b"}' in prompt
    named = render(chat_templates.HERMES, USER, assistant(), {**ANSWER, "name": "other"})
    assert '{"name": "other", "content": "21 °C"}' in named


@pytest.mark.parametrize("template", [chat_templates.QWEN25, chat_templates.QWEN3, chat_templates.DEEPSEEK_V31])
def test_malformed_arguments_are_sent_on(template: str) -> None:
    """A model's own slip must not end the chat."""
    assert "Par" in render(template, USER, assistant(arguments='{"city": "Par'), ANSWER)


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls_are_none(calls: list[Any] | None) -> None:
    """V3.1's template takes an empty list for calls."""
    prompt = render(chat_templates.DEEPSEEK_V31, USER, {"role": "assistant", "content": "Sunny.", "tool_calls": calls})
    assert "Sunny.<｜end▁of▁sentence｜>" in prompt and "tool▁calls" not in prompt


def test_content_may_have_to_be_a_string() -> None:
    """As in a template that looks for `</think>` in every content."""
    template = (
        "{% for message in messages %}{% if '</think>' in message.content %}{% endif %}"
        "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}"
    )
    assert render(template, USER, assistant(None), ANSWER) == f'{{"name": "weather", "arguments": {REWRITTEN}}}'


def test_a_template_without_calls() -> None:
    with pytest.raises(TextError, match="chat template refused"):
        render(chat_templates.PLAIN + "{{ raise_exception('no tools') if messages[-1].role == 'tool' }}", USER, ANSWER)
    text = render(chat_templates.PLAIN.replace("message.content", "(message.content or '')"), USER, assistant("Hm"))
    assert text == "user: Weather?\nassistant: Hm\n"


def test_the_clients_messages_are_not_changed() -> None:
    variables = parse_messages(json.dumps([USER, assistant(), ANSWER]))
    before = json.dumps(variables)
    ChatTemplate(chat_templates.QWEN25).render(variables)
    assert json.dumps(variables) == before


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "assistant", "tool_calls": {}}, r"messages\[0\]\.tool_calls must be a list"),
        ({"role": "assistant", "tool_calls": [1]}, r"tool_calls\[0\] must be \{"),
        ({"role": "assistant", "tool_calls": [{"name": "f"}]}, r"tool_calls\[0\] must be \{"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}, r"tool_calls\[0\] must be \{"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]},
            r"tool_calls\[0\]\.function\.arguments must be a string",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": [], "function": {"name": "f"}}]},
            r"tool_calls\[0\]\.id must be a string",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 0}}]},
            r"arguments must be a string",
        ),
        ({"role": "tool", "content": "", "tool_call_id": {}}, r"tool_call_id must be a string"),
        ({"role": "tool", "content": "", "tool_call_id": 7}, r"tool_call_id must be a string"),
        ({"role": "tool", "content": None}, "content is missing"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content is missing"),
    ],
)
def test_bad_tool_messages(message: dict[str, Any], error: str) -> None:
    with pytest.raises(TextError, match=error) as caught:
        parse_messages(json.dumps([message]))
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "type", "function", "name", "arguments", "a"]), values, max_size=4)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@given(
    calls=st.lists(
        st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.text(max_size=3), "arguments": JSON})})
        | JSON,
        max_size=3,
    )
    | JSON,
    answer=st.dictionaries(st.sampled_from(["tool_call_id", "name", "content"]), JSON),
)
@pytest.mark.parametrize(
    "template",
    [chat_templates.DEEPSEEK_R1, chat_templates.DEEPSEEK_V31, chat_templates.QWEN25, chat_templates.QWEN3_CODER],
)
def test_any_tool_message_gives_a_prompt_or_a_clear_error(template: str, calls: Any, answer: dict[str, Any]) -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", **answer}]
    try:
        prompt = render(template, *messages)
    except TextError as error:
        assert "\n" not in str(error)
    else:
        assert USER["content"] in prompt and isinstance(calls, list) and calls


@pytest.mark.parametrize("depth", range(100, 1200, 50))
def test_deep_arguments(depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    messages = f'[{{"role": "assistant", "tool_calls": [{{"function": {{"name": "f", "arguments": {nested}}}}}]}}]'
    for template in (chat_templates.DEEPSEEK_V31, chat_templates.QWEN25):
        try:
            prompt = ChatTemplate(template).render({**parse_messages(messages), "bos_token": ""})
        except TextError as error:
            assert depth > 500, error
        else:
            assert prompt.count("a") >= depth


# --- Thinking


@pytest.mark.parametrize(
    ("template", "variable", "has_reasoning"),
    [
        (chat_templates.QWEN3, "enable_thinking", True),
        (chat_templates.DEEPSEEK_V31, "thinking", True),
        (chat_templates.DEEPSEEK_R1, None, True),
        (chat_templates.PLAIN, None, False),
    ],
)
def test_what_a_template_knows_of_thinking(template: str, variable: str | None, has_reasoning: bool) -> None:
    chat = ChatTemplate(template)
    assert (chat.thinking_variable, chat.has_reasoning) == (variable, has_reasoning)


@pytest.mark.parametrize(
    ("template", "wanted", "end"),
    [
        (chat_templates.QWEN3, None, "<|im_start|>assistant\n"),
        (chat_templates.QWEN3, True, "<|im_start|>assistant\n"),
        (chat_templates.QWEN3, False, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (chat_templates.DEEPSEEK_V31, None, "<｜Assistant｜></think>"),
        (chat_templates.DEEPSEEK_V31, True, "<｜Assistant｜><think>"),
        (chat_templates.DEEPSEEK_V31, False, "<｜Assistant｜></think>"),
        (chat_templates.DEEPSEEK_R1, None, "<｜Assistant｜><think>\n"),
        (chat_templates.DEEPSEEK_R1, True, "<｜Assistant｜><think>\n"),
    ],
)
def test_thinking(template: str, wanted: bool | None, end: str) -> None:
    variables = {**parse_messages(json.dumps([USER])), "bos_token": ""}
    prompt = ChatTemplate(template).render(variables, enable_thinking=wanted)
    assert prompt.endswith(end)
    assert opens_reasoning(prompt) == end.rstrip().endswith("<think>")


def test_the_argument_overrides_the_templates_own_options() -> None:
    options = {"messages": [USER], "chat_template_kwargs": {"thinking": True}}
    variables = {**parse_messages(json.dumps(options)), "bos_token": ""}
    template = ChatTemplate(chat_templates.DEEPSEEK_V31)
    assert template.render(variables).endswith("<think>")
    assert template.render(variables, enable_thinking=False).endswith("</think>")


@pytest.mark.parametrize(
    ("template", "wanted", "message"),
    [
        (chat_templates.DEEPSEEK_R1, False, "enable_thinking is false, but this model always thinks"),
        (chat_templates.PLAIN, True, "enable_thinking is given, but .* has no such switch: leave it out"),
        (chat_templates.PLAIN, False, "enable_thinking is given, but .* has no such switch: leave it out"),
    ],
)
def test_thinking_that_cannot_be_switched(template: str, wanted: bool, message: str) -> None:
    with pytest.raises(TextError, match=message):
        ChatTemplate(template).render({**parse_messages(json.dumps([USER])), "bos_token": ""}, enable_thinking=wanted)
