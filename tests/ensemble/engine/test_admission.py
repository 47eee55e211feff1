"""From what a client asks for to a Request, with the tokenizer's and the engine's own part in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from deepseek_triton.ensemble.engine.admission import Admission, RequestOptions
from deepseek_triton.ensemble.engine.sequence import NEVER, Request
from deepseek_triton.ensemble.guided import GuideError
from deepseek_triton.ensemble.protocol.progress import PromptInfo, StreamHead
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.sampling import SamplingParams
from tests.support.checkpoints import make_tokenizer
from tests.support.fakes import FakeSink

VOCAB_SIZE = 352  # more than the tokenizer has, as real models do
END = 319
NOW = 1000.0
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one token for each tag, `<think>` the first behind the others."""
    directory = make_tokenizer(tmp_path_factory.mktemp("thinking"))
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    backend.save(str(directory / "tokenizer.json"))
    return directory


OPEN, CLOSE = 320, 321


def make(directory: Path, settings: EngineSettings | None = None, *, params: Any = None, **options: Any) -> Request:
    admission = Admission(directory, VOCAB_SIZE, (END,), settings or EngineSettings())
    wanted = RequestOptions(SamplingParams(**(params or {})), **options)
    return admission.make_request(7, "mine", np.array(PROMPT), wanted, FakeSink(), NOW)


def test_a_request_holds_what_was_asked(plain: Path) -> None:
    request = make(
        plain, stream=True, return_perf_metrics=True, return_num_input_tokens=False, return_num_output_tokens=False
    )
    assert (request.stream_id, request.request_id, request.prompt_ids.tolist()) == (7, "mine", PROMPT)
    assert request.is_streamed and request.returns_times and request.arrived_at == NOW
    assert not request.returns_input_count and not request.returns_output_count
    (sequence,) = request.sequences
    assert sequence.request is request and sequence.index == 0
    assert (sequence.guide, sequence.stop_matcher, sequence.bad_words, sequence.thinking) == (None,) * 4


def test_a_direct_call_has_no_head_and_is_not_acknowledged(plain: Path) -> None:
    direct = make(plain, exclude_input_in_output=False)
    assert direct.head is None and not direct.expects_acknowledgement
    info = PromptInfo(False, True)
    told, echoed = make(plain, prompt_info=info), make(plain, prompt_info=info, exclude_input_in_output=False)
    assert told.expects_acknowledgement and told.head == StreamHead(info)
    assert echoed.head == StreamHead(info, tuple(PROMPT))


@pytest.mark.parametrize(
    ("asked", "level"), [(None, 3), (0, 3), (1, 1), (5, 5), (6, None), (-1, None)]
)  # None: refused
def test_priorities(plain: Path, asked: int | None, level: int | None) -> None:
    settings = EngineSettings(priority_levels=5)
    if level is not None:
        assert make(plain, settings, priority=asked).priority == level
        return
    with pytest.raises(
        ValueError, match=rf"^priority is {asked}, must be 1 \(most urgent\) to 5, or 0 for the default$"
    ):
        make(plain, settings, priority=asked)


@pytest.mark.parametrize(
    ("default", "asked", "deadline"),
    [(0, None, NEVER), (0, 500, NOW + 0.5), (2000, None, NOW + 2), (2000, 500, NOW + 0.5), (2000, 0, NEVER)],
)
def test_time_limits(plain: Path, default: int, asked: int | None, deadline: float) -> None:
    request = make(plain, EngineSettings(timeout_ms=default), timeout_ms=asked)
    assert (request.deadline, request.queue_deadline) == (deadline, NEVER)
    request = make(plain, EngineSettings(queue_timeout_ms=default), queue_timeout_ms=asked)
    assert (request.deadline, request.queue_deadline) == (NEVER, deadline)


@pytest.mark.parametrize(
    ("end_id", "expected"), [(None, {END}), (3, {3}), (-1, set()), (VOCAB_SIZE - 1, {VOCAB_SIZE - 1})]
)
def test_the_end_token_can_be_another_or_none(plain: Path, end_id: int | None, expected: set[int]) -> None:
    assert make(plain, params={"end_id": end_id}).sequences[0].sampler.end_ids == expected


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"end_id": VOCAB_SIZE}, {}, "end_id is 352, must be below the vocabulary size, 352"),
        ({"end_id": 3}, {"guide_type": "json"}, "end_id can't be combined with guided decoding"),
        ({"end_id": -1}, {"guide_type": "json"}, "end_id can't be combined with guided decoding"),
        ({}, {"guide_type": "jsn"}, "guided_decoding_guide_type is 'jsn', must be one of json"),
        ({}, {"guide_type": "json_schema"}, "guided_decoding_guide is empty: send a json_schema"),
        ({}, {"guide_type": "json_schema", "guide": "{"}, "the json_schema is not JSON"),
        ({}, {"guide_type": "regex", "guide": "("}, "the regex is invalid"),
        ({}, {"guide_type": "choice", "guide": "[]"}, "the choice must be a JSON list of at least one string"),
        ({}, {"thinking_token_budget": 5}, "thinking_token_budget is given, but this model's tokenizer has no token"),
        ({}, {"stop_words": ("\ufffd",)}, "stop_words[0] holds U+FFFD"),
        ({}, {"bad_words": ("a", "x" * 20_000)}, "bad_words has 20001 characters in all"),
    ],
)
def test_what_is_wrong_is_found_here_and_told_in_one_line(
    plain: Path, params: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        make(plain, params=params, **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_budget_of_reasoning_where_the_prompt_opened_it_and_where_the_model_may(thinking: Path) -> None:
    opened = make(thinking, prompt_info=PromptInfo(True), thinking_token_budget=0).sequences[0].thinking
    assert opened is not None and opened.is_open and opened.forced_token == CLOSE
    for info in (PromptInfo(False), PromptInfo(None), None):
        not_yet = make(thinking, prompt_info=info, thinking_token_budget=0).sequences[0].thinking
        assert not_yet is not None and not not_yet.is_open and not_yet.forced_token is None
        not_yet.push(OPEN)
        assert not_yet.forced_token == CLOSE
    without = make(thinking, prompt_info=PromptInfo(True)).sequences[0].thinking
    assert without is not None and without.is_open and without.forced_token is None


def test_the_guide_begins_where_the_reasoning_ends(thinking: Path) -> None:
    options: dict[str, Any] = {"guide_type": "choice", "guide": '["yes"]'}
    opened = make(thinking, prompt_info=PromptInfo(True), **options).sequences[0]
    assert not opened.is_guided and opened.thinking is not None
    opened.thinking.push(CLOSE)
    assert opened.is_guided
    assert make(thinking, prompt_info=PromptInfo(False), **options).sequences[0].is_guided


def test_each_sample_has_a_state_of_its_own(thinking: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(thinking / "tokenizer.json"))
    y, e, n, o = tokenizer.encode("yeno").ids
    request = make(
        thinking, params={"num_return_sequences": 3, "temperature": 1.0, "seed": 5}, prompt_info=PromptInfo(True),
        guide_type="choice", guide='["yes", "no"]', stop_words=("x",), bad_words=("z",), thinking_token_budget=1,
    )  # fmt: skip
    assert [sequence.index for sequence in request.sequences] == [0, 1, 2]
    for name in ("sampler", "guide", "stop_matcher", "bad_words", "thinking"):
        assert len({id(getattr(sequence, name)) for sequence in request.sequences}) == 3, name
    guides = [sequence.guide for sequence in request.sequences]
    for guide, tokens in zip(guides, ([y, e], [n, o], [n]), strict=True):
        assert guide is not None
        for token in tokens:
            guide.accept(token)
    masks = [guide.mask(timeout_s=30) for guide in guides if guide]
    next_ids = [
        np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")) for mask in masks if mask is not None
    ]
    assert [tokenizer.decode([ids[0]]) for ids in next_ids] == ["s", "", "o"], "no's end is special"
    with pytest.raises(GuideError):
        guides[0].accept(o)  # type: ignore[union-attr]
        guides[0].mask(timeout_s=30)  # type: ignore[union-attr]
    first, second, _ = request.sequences
    assert first.thinking is not None and second.thinking is not None
    first.thinking.push(1)
    assert (first.thinking.forced_token, second.thinking.forced_token) == (CLOSE, None)
    draws = [sequence.sampler.device_sampling() for sequence in request.sequences]
    assert len({draw.seed for draw in draws if draw}) == 3 and draws[0] is not None and draws[0].seed == 5
