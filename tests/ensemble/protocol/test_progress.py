"""Progress and prompt info survive the way through JSON, whatever they hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.ensemble.protocol.contract import FINISH_REASONS
from deepseek_triton.ensemble.protocol.progress import LogProbs, Progress, PromptInfo, StreamHead, Update

INT32 = st.integers(0, 2**31 - 1)
IDS = st.lists(INT32, max_size=6).map(tuple)
LOG_PROB = st.floats(max_value=0, allow_nan=False, width=32)
INFO = st.builds(PromptInfo, st.none() | st.booleans(), st.booleans())
UPDATES = st.builds(
    Update,
    index=st.integers(0, 63),
    ids=IDS,
    num_output_tokens=INT32,
    finish_reason=st.none() | st.sampled_from(FINISH_REASONS),
    num_cut_chars=INT32,
    log_probs=st.none()
    | st.builds(
        LogProbs,
        st.lists(LOG_PROB, max_size=3).map(tuple),
        LOG_PROB,
        st.lists(st.lists(st.tuples(INT32, LOG_PROB), max_size=3).map(tuple), max_size=3).map(tuple),
    ),
    times_ns=st.none() | st.tuples(*[st.integers(0, 2**63 - 1)] * 4),
    num_cached_tokens=INT32,
    num_reasoning_tokens=INT32,
)
PROGRESS = st.builds(
    Progress,
    stream_id=st.integers(0, 2**64 - 1),
    updates=st.lists(UPDATES, max_size=4).map(tuple),
    head=st.none() | st.builds(StreamHead, INFO, IDS, st.booleans(), st.none() | INT32, st.booleans()),
    num_input_tokens=st.none() | INT32,
    shows_output_tokens=st.booleans(),
    shows_index=st.booleans(),
    is_last=st.booleans(),
)


@pytest.mark.slow
@given(PROGRESS)
def test_progress_reads_back_as_it_was(progress: Progress) -> None:
    text = progress.to_json()
    assert "\n" not in text
    assert Progress.from_json(text.encode(), progress.ids) == progress


@given(INFO)
def test_prompt_info_reads_back_as_it_was(info: PromptInfo) -> None:
    assert PromptInfo.from_json(info.to_json().encode()) == info


def test_the_ids_travel_in_their_own_tensor_one_behind_the_other() -> None:
    progress = Progress(1, (Update(0, (11, 12), 2), Update(1, (), 0), Update(2, (13,), 1)))
    assert progress.ids == [11, 12, 13]
    read = Progress.from_json(progress.to_json(), [21, 22, 23])
    assert [update.ids for update in read.updates] == [(21, 22), (), (23,)]


@pytest.mark.parametrize(
    "text", ["", "{", "5", "null", "[]", "[null]", "[1, 0]", '["x", true]', "[true, true, true, true]", "[" * 100_000]
)
def test_what_a_direct_client_sends_as_prompt_info_is_checked(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"prompt_info is .*, must be what the tokenizer gives; leave it out"
    ) as caught:
        PromptInfo.from_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
