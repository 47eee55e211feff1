"""Tool calls in DeepSeek's and Hermes' formats, well-formed and not, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_triton.ensemble.text.channels import Channels, ChannelSplitter
from deepseek_triton.ensemble.text.tokenizer import IncrementalDetokenizer
from deepseek_triton.ensemble.text.tool_calls.formats import DEEPSEEK, HERMES, Opening, ToolFormat, detect_format
from deepseek_triton.ensemble.text.tool_calls.parser import ToolCallDelta, ToolCallParser, random_id
from tests.support import chat_templates
from tests.support.cuts import cuttings, pieces
from tests.support.real_tokenizers import deepseek

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
Call = tuple[str, str]  # name and arguments


def v3(name: str, arguments: str) -> str:
    return f"{CALL}function{SEP}{name}\n```json\n{arguments}\n```{CALL_END}"


def v31(name: str, arguments: str) -> str:
    return f"{CALL}{name}{SEP}{arguments}{CALL_END}"


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def join(deltas: list[ToolCallDelta]) -> list[Call]:
    """Whole calls of deltas; ids and names must come once, first, and in order."""
    calls: list[Call] = []
    for delta in deltas:
        if delta.index == len(calls):
            assert delta.id and delta.name
            calls.append((delta.name, delta.arguments))
        else:
            assert delta.index == len(calls) - 1 and delta.id is None and delta.name is None and delta.arguments
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return calls


def parse(tool_format: ToolFormat, text: str, cuts: list[int] | None = None) -> tuple[str, list[Call]]:
    parser = ToolCallParser(tool_format)
    parts = [parser.push(piece) for piece in pieces(text, cuts or [])] + [parser.push("", final=True)]
    return "".join(part[0] for part in parts), join([delta for part in parts for delta in part[1]])


PARIS, ROME = '{"city": "Paris"}', '{"city":"Rome","days":[1,{"a":"}"}]}'
TRICKY = json.dumps({"code": f'```\n{CALL_END}</tool_call>\n"}}\\', "é": "你"}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("tool_format", "text", "answer", "calls"),
    [
        # DeepSeek V3 and R1
        (DEEPSEEK, "Hello <b>.", "Hello <b>.", []),
        (DEEPSEEK, CALLS + v3("weather", PARIS) + CALLS_END, "", [("weather", PARIS)]),
        (DEEPSEEK, f"So:\n{CALLS}{v3('f', PARIS)}\n{v3('g', ROME)}{CALLS_END}\n", "So:\n", [("f", PARIS), ("g", ROME)]),
        (DEEPSEEK, CALLS + v3("f", TRICKY) + CALLS_END + "Done", "Done", [("f", TRICKY)]),
        (DEEPSEEK, v3("f", PARIS), "", [("f", PARIS)]),  # no section around it
        (DEEPSEEK, CALLS + v3("f", PARIS), "", [("f", PARIS)]),  # not closed
        (DEEPSEEK, f"{CALLS}{CALL}function{SEP}f\n{PARIS}{CALL_END}{CALLS_END}", "", [("f", PARIS)]),  # no fence
        (DEEPSEEK, f"{CALLS}{CALL}function{SEP}f\n```json\n```{CALL_END}{CALLS_END}", "", [("f", "{}")]),
        # DeepSeek V3.1
        (DEEPSEEK, CALLS + v31("f", PARIS) + v31("g", ROME) + CALLS_END, "", [("f", PARIS), ("g", ROME)]),
        (DEEPSEEK, CALLS + v31("f", TRICKY) + CALLS_END, "", [("f", TRICKY)]),
        (DEEPSEEK, f"{CALLS}{CALL}f{SEP}{CALL_END}{CALLS_END}", "", [("f", "{}")]),
        (DEEPSEEK, CALLS + v31("f", "{}") + CALLS_END + " \n", "", [("f", "{}")]),
        (DEEPSEEK, CALLS + v31("f", "{}") + "  and so", "  and so", [("f", "{}")]),
        # An incomplete call, or arguments that never close: the text so far
        (DEEPSEEK, f'{CALLS}{CALL}f{SEP}{{"city": "Pa', "", [("f", '{"city": "Pa')]),
        (DEEPSEEK, f'{CALLS}{CALL}f{SEP}{{"a": 1{CALL_END}{CALLS_END}Hi', "Hi", [("f", '{"a": 1')]),
        (DEEPSEEK, f"{CALLS}{v3('f', PARIS)[:-len(CALL_END)]}{CALLS_END}Hi", "Hi", [("f", PARIS)]),
        # Text before or behind what is no call is read on
        (DEEPSEEK, f"{CALL}bad {v31('f', PARIS)}", f"{CALL}bad ", [("f", PARIS)]),
        (DEEPSEEK, f"{v31('f', PARIS)} {CALL}x y", f" {CALL}x y", [("f", PARIS)]),
        # Hermes
        (HERMES, hermes("weather", PARIS), "", [("weather", PARIS)]),
        (HERMES, f"Two:\n{hermes('f', PARIS)}\n{hermes('g', ROME)}\n", "Two:\n", [("f", PARIS), ("g", ROME)]),
        (HERMES, hermes("f", TRICKY) + "Done", "Done", [("f", TRICKY)]),
        (HERMES, '<tool_call>{"name":"f","arguments":{}}</tool_call>', "", [("f", "{}")]),
        (HERMES, '<tool_call>\n{"arguments": {"a": [1]}, "name": "f"}\n</tool_call>x', "x", [("f", '{"a": [1]}')]),
        (HERMES, '<tool_call>\n{"id": 3, "name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "\\u0066\\"", "arguments": {}}</tool_call>', "", [('f"', "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}} </tool_call> More', " More", [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>x', "x", [("f", '{"a": 1')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}} and so', " and so", [("f", '{"a": 1}')]),
        (HERMES, f"<tool_call>{{oops {hermes('f', PARIS)}", "<tool_call>{oops ", [("f", PARIS)]),
        (HERMES, '<tool_call>{"arguments": {"a": "\\ud83d"}, "name": "f"}', "", [("f", '{"a": "\\ud83d"}')]),
    ],
)  # fmt: skip
def test_parse(tool_format: ToolFormat, text: str, answer: str, calls: list[Call]) -> None:
    assert parse(tool_format, text) == (answer, calls)
    assert parse(tool_format, text, list(range(len(text)))) == (answer, calls)


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (DEEPSEEK, f"{CALLS}{CALLS_END}"),
        (DEEPSEEK, f"{CALLS} nothing"),
        (DEEPSEEK, f"{CALLS}\n{CALL}f"),
        (DEEPSEEK, f"{CALLS}{CALL}f{SEP}"),
        (DEEPSEEK, f"{CALL}two words{SEP}{{}}{CALL_END}"),
        (DEEPSEEK, f"{CALL}f{SEP}[1]{CALL_END}"),
        (DEEPSEEK, f"{CALL}f{SEP}null{CALL_END}"),
        (DEEPSEEK, f"{CALL}function{SEP}f\n```json\n[1]\n```{CALL_END}"),
        (DEEPSEEK, f"{CALL}{'f' * 300}{SEP}{{}}{CALL_END}"),
        (DEEPSEEK, hermes("f", PARIS)),
        (HERMES, CALLS + v3("f", PARIS) + CALLS_END),
        (HERMES, "Use <tool_call> here"),
        (HERMES, '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "arguments": 1}</tool_call>'),
        (HERMES, '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"</tool_call>'),
        (HERMES, '<tool_call>{"a": tru'),
        (HERMES, '<tool_call>{"name": "f'),
        (HERMES, "<tool_call>\n<function=f>\n</function>\n</tool_call>"),
        (HERMES, "</tool_call>"),
        (HERMES, "  "),
    ],
)
def test_what_is_no_call_stays_the_text_that_it_was(tool_format: ToolFormat, text: str) -> None:
    assert parse(tool_format, text) == (text, [])
    assert parse(tool_format, text, list(range(len(text)))) == (text, [])


# Pieces that are hard to tell apart: whole calls, markers, parts of them, JSON and its parts, ordinary text.
FRAGMENTS = {
    DEEPSEEK: [
        CALLS, CALLS_END, CALL, CALL_END, SEP, v3("f", PARIS), v31("g", TRICKY), f"function{SEP}", "f", "f\n",
        "```json\n", "```", "<｜tool", CALL[:-1], CALL_END[:-2],
    ],
    HERMES: [
        "<tool_call>", "</tool_call>", hermes("f", PARIS), hermes("g", TRICKY), '{"name": "f", ', '"arguments": ',
        '{"arguments": {"a": 1}, "name": "f"}', '{"name": "f"}', "<tool", "</tool_call", '"name"', ":", ",",
    ],
}  # fmt: skip
COMMON = [PARIS, "{", "}", '"', "\\", '\\"', "[", "]", " ", "\n", "<", "a", "你"]


@pytest.mark.slow
@settings(max_examples=400)
@given(data=st.data(), cuts=cuttings(400))
@pytest.mark.parametrize("tool_format", [DEEPSEEK, HERMES], ids=lambda tool_format: tool_format.name)
def test_cuts_change_nothing(tool_format: ToolFormat, data: st.DataObject, cuts: list[int]) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS[tool_format] + COMMON), max_size=14)))
    whole_text, deltas = ToolCallParser(tool_format).push(text, final=True)
    calls = join(list(deltas))
    assert parse(tool_format, text, cuts) == (whole_text, calls)
    in_calls = sum(f"{name}{arguments}".count("你") for name, arguments in calls)  # a function may have the name
    assert whole_text.count("你") + in_calls == text.count("你"), "none is lost"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda values: st.lists(values) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)
TOOL_NAMES = st.from_regex(r"[a-zA-Z0-9_.-]{1,64}", fullmatch=True)


@pytest.mark.slow
@given(
    calls=st.lists(st.tuples(TOOL_NAMES, ARGUMENTS), min_size=1, max_size=3),
    indent=st.sampled_from([None, 2]),
    cuts=cuttings(300),
)  # fmt: skip
@pytest.mark.parametrize(("tool_format", "write"), [(DEEPSEEK, v3), (DEEPSEEK, v31), (HERMES, hermes)])
def test_every_call_comes_back(
    tool_format: ToolFormat, write: Any, calls: list[tuple[str, Any]], indent: int | None, cuts: list[int]
) -> None:
    expected = [(name, json.dumps(arguments, indent=indent, ensure_ascii=False)) for name, arguments in calls]
    body = "\n".join(write(name, arguments) for name, arguments in expected)
    frame = f"{CALLS}{body}{CALLS_END}" if tool_format is DEEPSEEK else body
    assert parse(tool_format, f"So: {frame}", cuts) == ("So: ", expected)


def test_arguments_stream() -> None:
    """They are given out as they come, not when the call is whole."""
    parser = ToolCallParser(HERMES, new_id=iter(["call_a", "call_b"]).__next__)
    tokens = [
        "Hm",
        " <tool",
        "_call>",
        '\n{"name": "f',
        '", "arguments": ',
        '{"city',
        '": "Pa',
        'ris"}',
        "}\n</tool_",
        "call>",
        "\n",
    ]
    assert [parser.push(token) for token in tokens] == [
        ("Hm", ()),
        (" ", ()),
        ("", ()),
        ("", ()),
        ("", ()),
        ("", (ToolCallDelta(0, "call_a", "f", '{"city'),)),
        ("", (ToolCallDelta(0, None, None, '": "Pa'),)),
        ("", (ToolCallDelta(0, None, None, 'ris"}'),)),
        ("", ()),
        ("", ()),
        ("", ()),
    ]
    assert parser.push(hermes("g", "{}")) == ("", (ToolCallDelta(1, "call_b", "g", "{}"),))
    assert parser.push("", final=True) == ("", ())
    with pytest.raises(RuntimeError, match="final"):
        parser.push("a")


def test_openais_form() -> None:
    first, later = ToolCallDelta(0, "call_a", "f", "{"), ToolCallDelta(0, None, None, "}")
    function = {"name": "f", "arguments": "{"}
    assert first.as_openai() == {"index": 0, "id": "call_a", "type": "function", "function": function}
    assert later.as_openai() == {"index": 0, "function": {"arguments": "}"}}


def test_ids_are_unique() -> None:
    ids = {random_id() for _ in range(1000)}
    assert len(ids) == 1000 and all(identity.startswith("call_") and len(identity) == 29 for identity in ids)


def test_long_arguments_are_not_held_back() -> None:
    parser = ToolCallParser(DEEPSEEK)
    parser.push(f'{CALLS}{CALL}f{SEP}{{"a": "')
    for piece in ["x\\n", "if a <", CALL_END[:5], " b", "你"] * 100:
        assert parser.push(piece) == ("", (ToolCallDelta(0, None, None, piece),))
    assert parser.push("\\") == ("", ())  # what it escapes is still to come
    assert parser.push('""') == ("", (ToolCallDelta(0, None, None, '\\""'),))
    assert parser.push("}<") == ("", (ToolCallDelta(0, None, None, "}"),))
    assert parser.push(f"{CALL_END[1:]}Done", final=True) == ("Done", ())


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (chat_templates.DEEPSEEK_R1, DEEPSEEK),
        (chat_templates.DEEPSEEK_V31, DEEPSEEK),
        (chat_templates.QWEN25, HERMES),
        (chat_templates.QWEN3, HERMES),
        (chat_templates.HERMES, HERMES),
        (chat_templates.QWEN3_CODER, None),
        (chat_templates.PLAIN, None),
        ("", None),
    ],
)
def test_detect_format(template: str, expected: ToolFormat | None) -> None:
    assert detect_format(template) is expected


def test_formats_are_checked() -> None:
    assert DEEPSEEK.markers == {CALLS, CALLS_END, CALL, CALL_END, SEP}
    assert HERMES.markers == {"<tool_call>", "</tool_call>"}
    with pytest.raises(ValueError, match="'x' must have starts and openings"):
        ToolFormat("x", starts=(), openings=(), closing=(), stops=())
    with pytest.raises(ValueError, match=r"'x': an opening with arguments must end with '\{'"):
        ToolFormat("x", starts=("<",), openings=(Opening(("<",)),), closing=(), stops=())


# --- Channels

ANSWER = f"<think>\nI could write {hermes('no', '{}')}.\n</think>\n\nLet me look.\n{hermes('f', PARIS)}"


@pytest.mark.slow
@given(cuts=cuttings(len(ANSWER)))
def test_channels(cuts: list[int]) -> None:
    splitter = ChannelSplitter(False, HERMES)
    parts = [splitter.push(piece) for piece in pieces(ANSWER, cuts)] + [splitter.push("", final=True)]
    assert "".join(part.reasoning for part in parts) == f"\nI could write {hermes('no', '{}')}.\n"
    assert "".join(part.text for part in parts) == "\n\nLet me look.\n"
    assert join([delta for part in parts for delta in part.tool_calls]) == [("f", PARIS)]


def test_channels_switched_off() -> None:
    assert ChannelSplitter(None, None).push(ANSWER, final=True) == Channels(ANSWER)
    without_tools = ChannelSplitter(True, None).push("Hm</think>" + hermes("f", PARIS), final=True)
    assert without_tools == Channels(hermes("f", PARIS), "Hm")
    text, reasoning, calls = ChannelSplitter(None, HERMES).push(ANSWER, final=True)
    assert (text, reasoning) == ("<think>\nI could write .\n</think>\n\nLet me look.\n", "")
    assert [call.name for call in calls] == ["no", "f"]


@pytest.mark.parametrize("tool_format", [DEEPSEEK, HERMES])
def test_channels_of_real_tokens(tool_format: ToolFormat) -> None:
    """DeepSeek's tokenizer, token by token, as the serving side runs it."""
    calls = CALLS + v3("f", TRICKY) + v3("g", PARIS) + CALLS_END if tool_format is DEEPSEEK else hermes("f", TRICKY)
    ids = deepseek().encode(f"Hm, 你好 😀.\n</think>\n\nLet me look.{calls}<｜end▁of▁sentence｜>").tolist()
    detokenizer, splitter = IncrementalDetokenizer(deepseek()), ChannelSplitter(True, tool_format)
    parts = [splitter.push(detokenizer.push([index])) for index in ids]
    parts.append(splitter.push(detokenizer.push([], final=True), final=True))
    assert "".join(part.reasoning for part in parts) == "Hm, 你好 😀.\n"
    assert "".join(part.text for part in parts) == "\n\nLet me look."
    expected = [("f", TRICKY), ("g", PARIS)] if tool_format is DEEPSEEK else [("f", TRICKY)]
    assert join([delta for part in parts for delta in part.tool_calls]) == expected
    assert sum(bool(part.tool_calls) for part in parts) > 10
