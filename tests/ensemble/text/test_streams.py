"""From the engine's updates to a client's outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.ensemble.protocol import contract
from deepseek_triton.ensemble.protocol.contract import FinishReason
from deepseek_triton.ensemble.protocol.progress import LogProbs, Progress, PromptInfo, StreamHead, Update
from deepseek_triton.ensemble.text.stop_words import StopMatcher
from deepseek_triton.ensemble.text.streams import Stream, StreamOutputs
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.checkpoints import make_tokenizer

TOOL_CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "é"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Each byte is a token; the chat template writes tool calls as Qwen's does."""
    directory: Path = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] += "{# <tool_call> arguments #}"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_directory(directory)


def push(stream: Stream, *updates: Update, **more: Any) -> StreamOutputs:
    return stream.push(Progress(1, updates, **more))


def texts(outputs: StreamOutputs, spec: contract.TensorSpec = contract.TEXT_OUTPUT) -> list[str]:
    return [value.decode() for value in outputs[spec]]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token for each byte."""
    return tokenizer.encode(text).tolist() if text else []


def update(
    tokenizer: Tokenizer, content: str | list[int], reason: FinishReason | None = None, index: int = 0, **more: Any
) -> Update:
    ids = ids_of(tokenizer, content) if isinstance(content, str) else content
    return Update(index, tuple(ids), 7, reason, **more)


def test_text_is_given_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, StreamHead(PromptInfo()))
    a, first, second = ids_of(tokenizer, "aé")
    assert texts(push(stream, update(tokenizer, [a, first]))) == ["a"]
    outputs = push(stream, update(tokenizer, [second, first], "length"))
    assert texts(outputs) == ["é\ufffd"] and texts(outputs, contract.FINISH_REASON) == ["length"]


@pytest.mark.parametrize(
    ("echo", "answers", "expected"),
    [
        ("The prompt: ", ["a", "b"], ["The prompt: a", "b"]),
        ("The prompt", [""], ["The prompt"]),
    ],
)
def test_the_prompt_comes_back_once(tokenizer: Tokenizer, echo: str, answers: list[str], expected: list[str]) -> None:
    stream = Stream(tokenizer, StreamHead(PromptInfo(), tuple(ids_of(tokenizer, echo))))
    found = [texts(push(stream, update(tokenizer, answer))) for answer in answers[:-1]]
    found.append(texts(push(stream, update(tokenizer, answers[-1], "stop"))))
    assert found == [[text] for text in expected]


def test_a_character_may_begin_in_the_prompt_and_end_in_the_answer(tokenizer: Tokenizer) -> None:
    first, second = ids_of(tokenizer, "é")
    stream = Stream(tokenizer, StreamHead(PromptInfo(), (first,)))
    assert texts(push(stream, update(tokenizer, [second], "stop"))) == ["é"]


def test_the_prompt_is_neither_reasoning_nor_a_tool_call(tokenizer: Tokenizer) -> None:
    prompt = f"{TOOL_CALL}<think>"
    stream = Stream(tokenizer, StreamHead(PromptInfo(True, True), tuple(ids_of(tokenizer, prompt))))
    outputs = push(stream, update(tokenizer, "hm</think>ok", "stop"))
    assert texts(outputs) == [f"{prompt}ok"]
    assert texts(outputs, contract.REASONING_OUTPUT) == ["hm"] and texts(outputs, contract.TOOL_CALLS) == ["[]"]


@pytest.mark.slow
@given(st.text("aé日", max_size=12), st.lists(st.text("aé日", min_size=1, max_size=4), min_size=1, max_size=2))
def test_a_stop_word_is_cut_off_exactly(tokenizer: Tokenizer, text: str, words: list[str]) -> None:
    """As the engine does: safe tokens go out as they are, at a stop all of them and how much to cut."""
    stream, matcher = Stream(tokenizer, StreamHead(PromptInfo())), StopMatcher(tokenizer, words)
    ids = ids_of(tokenizer, text)
    sent, found = 0, ""
    for count, token in enumerate(ids, 1):
        state = matcher.push(token)
        end = count if state.is_stop else state.num_safe_tokens
        reason: FinishReason | None = "stop" if state.is_stop else None
        outputs = push(stream, Update(0, tuple(ids[sent:end]), end, reason, num_cut_chars=state.num_cut_chars))
        sent, found = end, found + texts(outputs)[0]
        if state.is_stop:
            break
    else:
        found += texts(push(stream, Update(0, tuple(ids[sent:]), len(ids), "length")))[0]
    # The word that is complete first ends the text, before the one among those that begins first.
    first = min((text.index(word) + len(word) for word in words if word in text), default=None)
    starts = [text[:first].index(word) for word in words if word in text[:first]] if first is not None else []
    assert found == (text[: min(starts)] if starts else text)


def test_reasoning_is_told_apart_where_it_is_asked_for(tokenizer: Tokenizer) -> None:
    expected: dict[bool | None, tuple[str, str | None]] = {
        True: ("yes", "no"),
        False: ("yes", "no"),
        None: ("<think>no</think>yes", None),
    }
    for is_open, (text, reasoning) in expected.items():
        stream = Stream(tokenizer, StreamHead(PromptInfo(is_open)))
        outputs = [push(stream, update(tokenizer, part)) for part in ("<th", "ink>no</thi")]
        outputs.append(push(stream, update(tokenizer, "nk>yes", "stop")))
        assert "".join(texts(o)[0] for o in outputs) == text
        if reasoning is None:
            assert all(contract.REASONING_OUTPUT not in o for o in outputs)
        else:
            assert "".join(texts(o, contract.REASONING_OUTPUT)[0] for o in outputs) == reasoning


def test_tool_calls_are_looked_for_where_the_prompt_offers_tools(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, StreamHead(PromptInfo(None, has_tools=True)))
    outputs = [
        push(stream, update(tokenizer, f"So: {TOOL_CALL[:30]}")),
        push(stream, update(tokenizer, TOOL_CALL[30:], "stop")),
    ]
    assert "".join(texts(o)[0] for o in outputs).strip() == "So:"
    deltas = [delta for o in outputs for delta in json.loads(texts(o, contract.TOOL_CALLS)[0])]
    assert deltas[0]["function"]["name"] == "now" and deltas[0]["id"]
    assert json.loads("".join(delta["function"]["arguments"] for delta in deltas)) == {"zone": "é"}
    plain = push(Stream(tokenizer, StreamHead(PromptInfo())), update(tokenizer, TOOL_CALL, "stop"))
    assert texts(plain) == [TOOL_CALL] and contract.TOOL_CALLS not in plain


def test_sequences_of_one_stream_don_t_mix(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, StreamHead(PromptInfo(False)))
    first, second, x = ids_of(tokenizer, "éx")
    opened = [*ids_of(tokenizer, "<think>"), first]
    outputs = push(stream, update(tokenizer, opened), update(tokenizer, [first], index=1), shows_index=True)
    assert (texts(outputs), outputs[contract.SEQUENCE_INDEX]) == (["", ""], [0, 1])
    outputs = push(stream, update(tokenizer, [second, x], index=1), update(tokenizer, [second]), shows_index=True)
    assert (texts(outputs), outputs[contract.SEQUENCE_INDEX]) == (["éx", ""], [1, 0])
    assert texts(outputs, contract.REASONING_OUTPUT) == ["", "é"]


def test_a_sequence_that_begins_after_another_s_end_is_read_the_same_way(tokenizer: Tokenizer) -> None:
    """With fewer slots than samples the first may be done before the second begins."""
    stream = Stream(tokenizer, StreamHead(PromptInfo(True), tuple(ids_of(tokenizer, "> "))))
    for index in range(2):
        outputs = push(stream, update(tokenizer, "hm</think>ok", "stop", index))
        assert texts(outputs) == ["> ok"] and texts(outputs, contract.REASONING_OUTPUT) == ["hm"]


def test_log_probs_lie_one_behind_the_other(tokenizer: Tokenizer) -> None:
    (token,) = ids_of(tokenizer, "x")
    half = ids_of(tokenizer, "é")[0]
    stream = Stream(tokenizer, StreamHead(PromptInfo()))
    top = (((token, -0.5), (half, -1.0)), ((half, -0.25),))
    outputs = push(
        stream,
        update(tokenizer, "ab", log_probs=LogProbs((-0.5, -0.75), -1.25, top)),
        update(tokenizer, "c", index=1, log_probs=LogProbs((-2.0,), -3.0, (((token, -2.0),),))),
    )
    assert outputs[contract.OUTPUT_LOG_PROBS] == [-0.5, -0.75, -2.0]
    assert outputs[contract.CUM_LOG_PROBS] == [-1.25, -3.0]
    split = {"id": half, "token": "\ufffd", "bytes": ["é".encode()[0]]}
    assert [json.loads(row) for row in outputs[contract.TOP_LOG_PROBS]] == [
        [{"id": token, "token": "x", "log_prob": -0.5}, {**split, "log_prob": -1.0}],
        [{**split, "log_prob": -0.25}],
        [{"id": token, "token": "x", "log_prob": -2.0}],
    ]
    outputs = push(stream, update(tokenizer, "d", log_probs=LogProbs((-0.5,), -1.75)))
    assert contract.TOP_LOG_PROBS not in outputs and contract.OUTPUT_TOKENS not in outputs


def test_who_asks_is_told_which_tokens_came_and_where_the_prompts_were(tokenizer: Tokenizer) -> None:
    stream = Stream(tokenizer, StreamHead(PromptInfo(), tells_details=True))
    a, first, second = ids_of(tokenizer, "aé")
    counts = (contract.NUM_CACHED_TOKENS, contract.NUM_REASONING_TOKENS)
    outputs = push(stream, Update(0, (a, first), 2, log_probs=LogProbs((-0.5, -0.75), -1.25), num_cached_tokens=3))
    assert [json.loads(token) for token in outputs[contract.OUTPUT_TOKENS]] == [
        {"id": a, "token": "a"},
        {"id": first, "token": "\ufffd", "bytes": ["é".encode()[0]]},
    ]
    assert [outputs[spec] for spec in counts] == [[3], [0]]
    outputs = push(stream, Update(0, (second,), 3, num_cached_tokens=3, num_reasoning_tokens=1))
    assert not {*counts, contract.OUTPUT_TOKENS} & set(outputs)
    outputs = push(stream, Update(0, (), 3, "stop", num_cached_tokens=3, num_reasoning_tokens=2))
    assert [outputs[spec] for spec in counts] == [[3], [2]]


def test_numbers_are_given_as_asked(tokenizer: Tokenizer) -> None:
    updates = [update(tokenizer, "a", index=index) for index in (0, 1)]
    plain = {contract.TEXT_OUTPUT, contract.FINISH_REASON}
    outputs = push(Stream(tokenizer, None), *updates, shows_output_tokens=False)
    assert set(outputs) == plain
    outputs = push(Stream(tokenizer, None), *updates, num_input_tokens=5)
    assert set(outputs) == {*plain, contract.NUM_INPUT_TOKENS, contract.NUM_OUTPUT_TOKENS}
    assert outputs[contract.NUM_INPUT_TOKENS] == [5, 5] and outputs[contract.NUM_OUTPUT_TOKENS] == [7, 7]
    outputs = push(Stream(tokenizer, None), update(tokenizer, "a", times_ns=(1, 2, 3, 4)))
    assert [outputs[spec] for spec in contract.TIME_OUTPUTS] == [[1], [2], [3], [4]]


def test_a_stream_whose_beginning_was_not_seen_is_plain_text(tokenizer: Tokenizer) -> None:
    outputs = push(Stream(tokenizer, None), update(tokenizer, f"<think>{TOOL_CALL}", "stop"), num_input_tokens=1)
    assert texts(outputs) == [f"<think>{TOOL_CALL}"]
    assert set(outputs) == set(contract.ALWAYS_OUTPUTS)
