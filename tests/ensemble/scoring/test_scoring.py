"""Rows, profiles, prompts and probabilities: everything of scoring that needs no server and no model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_triton.ensemble.protocol.settings import SettingsError
from deepseek_triton.ensemble.scoring.calibration import (
    LinearHead,
    ProbabilityCalibration,
    ProbabilityCalibrationError,
    label_scores,
    softmax,
)
from deepseek_triton.ensemble.scoring.profile import ScoringProfile, ScoringProfileError, check_labels
from deepseek_triton.ensemble.scoring.prompts import Prompter
from deepseek_triton.ensemble.scoring.rows import (
    LONGEST_ROW,
    ROW_LENS,
    RowError,
    ScoreRow,
    batch_tensors,
    group_rows,
    make_row,
    split_rows,
    stack_rows,
)
from deepseek_triton.ensemble.scoring.settings import ScoringSettings
from deepseek_triton.ensemble.text.errors import TextError
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.checkpoints import make_tokenizer


def ints(*values: int) -> Any:
    return np.array(values, np.int32)


# Rows


def test_a_prompt_stands_once_and_each_candidate_has_its_branch() -> None:
    row, labels = make_row(ints(5, 6, 7), [ints(1), ints(2, 3, 4), ints(8, 9)])
    assert row.input_ids.tolist() == [5, 6, 7, 2, 3, 8], "the last token of a candidate is asked for, never read"
    assert row.branch_ids.tolist() == [0, 0, 0, 2, 2, 3]
    assert row.target_ids.tolist() == [1, 2, 3, 4, 8, 9]
    assert labels.tolist() == [0, 1, 1, 1, 2, 2]
    # Each target is read where its predecessor stands: the prompt's end for a candidate's first.
    assert row.logit_positions[row.target_logits].tolist() == [2, 2, 3, 4, 2, 5]
    row.check(vocab_size=10, max_seq_len=6)


def test_candidates_of_one_token_cost_nothing_but_the_prompt() -> None:
    row, _ = make_row(ints(5, 6), [ints(n) for n in range(100)])
    assert (len(row), row.logit_positions.tolist(), set(row.target_logits.tolist())) == (2, [1], {0})


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 99), min_size=1, max_size=9),
            st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_stacked_rows_come_apart_as_they_were(made: list[tuple[list[int], list[list[int]]]]) -> None:
    rows = [make_row(ints(*prompt), [ints(*own) for own in candidates]) for prompt, candidates in made]
    tensors = stack_rows(rows)
    assert all(values.shape[0] == len(rows) for values in tensors.values())
    for found, (row, labels), padded in zip(split_rows(tensors), rows, tensors["target_labels"], strict=True):
        found.check(vocab_size=100, max_seq_len=64)
        assert found.input_ids.tolist() == row.input_ids.tolist()
        assert found.branch_ids.tolist() == row.branch_ids.tolist()
        assert found.target_ids[: len(labels)].tolist() == row.target_ids.tolist()
        assert padded.tolist() == labels.tolist() + [-1] * (len(padded) - len(labels))


ROW = make_row(ints(5, 6, 7), [ints(1), ints(2, 3)])[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": ints(5, 6, 7, 10)}, "input_ids has values from 5 to 10, must be 0 to 9"),
        ({"input_ids": ints(5, 6, 7, -1)}, "input_ids has values from -1 to 7"),
        ({"target_ids": ints(1, 2, 10)}, "target_ids has values from 1 to 10"),
        ({"logit_positions": ints(2, 4)}, "logit_positions has values from 2 to 4, must be 0 to 3"),
        ({"target_logits": ints(0, 0, 2)}, "target_logits has values from 0 to 2, must be 0 to 1"),
        ({"target_logits": ints(0)}, "target_logits holds 1 values, target_ids 3"),
        ({"branch_ids": ints(0, 0)}, "branch_ids holds 2 values, input_ids 4"),
        ({"branch_ids": ints(1, 0, 0, 2)}, "branch_ids must begin with 0"),
        ({"branch_ids": ints(0, 0, 2, 0)}, "branch_ids has 0, which is the prompt's, behind a candidate's tokens"),
        ({"target_ids": ints(), "target_logits": ints()}, "must hold at least one value"),
        ({"input_ids": ints(), "branch_ids": ints()}, "input_ids holds 0 tokens, must hold 1 to 4"),
        ({"input_ids": ints(*range(5)), "branch_ids": ints(0, 0, 0, 0, 0)}, "input_ids holds 5 tokens"),
    ],
)
def test_a_row_that_would_fail_the_whole_batch_is_refused_by_itself(change: dict[str, Any], message: str) -> None:
    ROW.check(vocab_size=10, max_seq_len=4)
    with pytest.raises(RowError, match=message):
        replace(ROW, **change).check(vocab_size=10, max_seq_len=4)


def test_tensors_that_are_no_rows_are_refused() -> None:
    tensors = stack_rows([make_row(ints(5, 6), [ints(1)])])
    with pytest.raises(RowError, match="target_ids is missing"):
        split_rows({name: values for name, values in tensors.items() if name != "target_ids"})
    with pytest.raises(RowError, match=r"target_ids has shape \[2, 1\], must be \[rows, values\]"):
        split_rows({**tensors, "target_ids": ints(1, 1).reshape(2, 1)})
    with pytest.raises(RowError, match="padding, -1, before a row's end"):
        split_rows({**tensors, "branch_ids": ints(-1, 0)[None]})


def test_a_batch_says_how_long_each_row_and_the_longest_is() -> None:
    rows = [make_row(ints(*range(n)), [ints(1), ints(2)])[0] for n in (2, 5, 3)]
    tensors = batch_tensors(rows)
    assert tensors["input_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2]
    assert tensors[ROW_LENS].tolist() == [[2], [5], [3]]
    assert tensors[LONGEST_ROW].shape == (5,)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_groups_hold_every_row_once_and_no_more_tokens_than_allowed(lengths: list[int], max_tokens: int) -> None:
    groups = group_rows(lengths, max_tokens)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[number] for number in group) <= max_tokens


# Profiles


def test_a_profile_reads_back_from_its_file(tmp_path: Path) -> None:
    profile = ScoringProfile(template="»{text}« is {good}: {}", labels=("ä", "b"), normalisation="sum", max_seq_len=7)
    profile.save(tmp_path)
    assert ScoringProfile.load(tmp_path) == profile
    assert profile.fill("{text} {x}") == "»{text} {x}« is {good}: {}", "braces mean nothing"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "no place"}, "template is 'no place', must hold {text} once"),
        ({"template": "{text}{text}"}, "must hold {text} once"),
        ({"normalisation": "max"}, "normalisation is 'max', must be one of mean, sum"),
        ({"labels": ("a",)}, "labels holds 1 label, must hold at least 2"),
        ({"labels": ("a", " ")}, r"labels\[1\] is ' ', must be text"),
    ],
)
def test_a_profile_at_fault(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoringProfileError, match=message):
        ScoringProfile(**fields)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels holds 0 label"),
        (["a"], "labels holds 1 label"),
        (["a", "b", "a"], r"labels\[2\] is 'a', which is a duplicate"),
        (["a", ""], r"labels\[1\] is '', must be text"),
        ([str(n) for n in range(1000)], "labels holds 1000 labels, must hold at most 256"),
    ],
)
def test_labels_at_fault(labels: list[str], message: str) -> None:
    with pytest.raises(ScoringProfileError, match=message):
        check_labels(labels, 256)


def test_a_damaged_profile_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(ScoringProfileError, match=r"scoring.json: No such file"):
        ScoringProfile.load(tmp_path)
    path = tmp_path / "scoring.json"
    for text, message in (("{", "not valid JSON"), ("{}", "missing or unknown fields"), ("[]", "missing or unknown")):
        path.write_text(text)
        with pytest.raises(ScoringProfileError, match=message):
            ScoringProfile.load(tmp_path)
    ScoringProfile().save(tmp_path)
    values = json.loads(path.read_text())
    for change, message in (({"format": 2}, "has format 2"), ({"max_labels": "x"}, "max_labels is 'x', must be a int")):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(ScoringProfileError, match=message):
            ScoringProfile.load(tmp_path)


def test_settings_travel_as_text() -> None:
    settings = ScoringSettings(num_threads=3, max_pass_tokens=99)
    assert ScoringSettings.from_parameters({**settings.to_parameters(), "EXECUTION_ENV_PATH": "x"}) == settings
    assert ScoringSettings.from_model_config("{}") == ScoringSettings()
    cores = len(os.sched_getaffinity(0))
    for threads, count, expected in (("0", 1, 0), ("0", 2, max(1, cores // 2)), ("3", 2, 3), ("0", 999, 1)):
        config = {"parameters": {"num_threads": {"string_value": threads}}, "instance_group": [{"count": count}]}
        assert ScoringSettings.from_model_config(json.dumps(config)).num_threads == expected
    for parameters, message in (
        ({"max_num_seqs": "1"}, "unknown scoring engine parameter 'max_num_seqs'"),
        ({"num_threads": "x"}, "num_threads is 'x', must be an integer"),
        ({"max_pass_tokens": "0"}, "max_pass_tokens is 0, must be an integer of at least 1"),
    ):
        with pytest.raises(SettingsError, match=message):
            ScoringSettings.from_parameters(parameters)


# Prompts: the tokenizer is one of bytes, so each character is a token.


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_directory(make_tokenizer(tmp_path / "tokenizer"))


def test_a_text_goes_into_the_template_and_labels_behind_it(tokenizer: Tokenizer) -> None:
    prompter = Prompter(ScoringProfile(template="<{text}>:", labels=("no", "yes"), max_seq_len=32), tokenizer)
    row, targets, num_tokens = prompter.row("hi", None, prompter.labels_of(None))
    assert tokenizer.decode(row.input_ids[:num_tokens]) == "<hi>:"
    assert tokenizer.decode(row.target_ids[targets == 0]) == " no"
    assert tokenizer.decode(row.target_ids[targets == 1]) == " yes"
    own = prompter.labels_of([b"a", b"b"])
    assert tokenizer.decode(prompter.row(b"hi", None, own)[0].target_ids) == " a b"


@pytest.mark.slow
def test_a_chat_ends_where_the_answer_begins_so_its_labels_have_no_prefix(tokenizer: Tokenizer) -> None:
    profile = ScoringProfile(template="<{text}>", labels=("no", "yes"), max_seq_len=64)
    row, _, num_tokens = Prompter(profile, tokenizer).row(None, '[{"role": "user", "content": "hi"}]', profile.labels)
    assert tokenizer.decode(row.input_ids[:num_tokens]) == "user: hi\n", "messages don't go into the template"
    assert tokenizer.decode(row.target_ids) == "noyes"
    chat = replace(profile, is_chat=True, label_prefix="")
    row, _, num_tokens = Prompter(chat, tokenizer).row('"}', None, profile.labels)
    assert tokenizer.decode(row.input_ids[:num_tokens]) == 'user: <"}>\n'


def test_prompts_at_fault(tokenizer: Tokenizer) -> None:
    prompter = Prompter(ScoringProfile(max_seq_len=10), tokenizer)
    labels = ("no", "yes")
    for arguments, message in (
        (("", None), "text_input is empty"),
        ((" \n", None), "text_input is empty"),
        ((None, None), "give either text_input or messages"),
        (("x", "[]"), "give either text_input or messages"),
        (("123456", None), "the prompt has 6 tokens and its labels 5; at most 10 are allowed"),
        ((b"\xff", None), "text_input is not UTF-8"),
    ):
        with pytest.raises(TextError, match=message):
            prompter.row(arguments[0], arguments[1], labels)
    assert len(prompter.row("12345", None, labels)[0]) == 10
    with pytest.raises(ScoringProfileError, match="labels is missing, and the model has no default labels"):
        prompter.labels_of(None)
    with pytest.raises(TextError, match=r"labels\[1\] is not UTF-8"):
        prompter.labels_of([b"a", b"\xff"])


def test_what_the_prompts_of_all_texts_begin_with(tokenizer: Tokenizer) -> None:
    def beginning(**changes: Any) -> str:
        return tokenizer.decode(np.array(Prompter(ScoringProfile(**changes), tokenizer).prefix_ids(), np.int32))

    assert beginning(template="So: {text}, right?") == "So: "
    assert beginning(template="{text} is") == ""
    assert beginning(template="<{text}>", is_chat=True, label_prefix="") == "user: <"


def test_a_row_begins_with_a_prefix_only_where_something_of_its_prompt_is_left() -> None:
    row, _ = make_row(ints(5, 6, 7), [ints(1, 2), ints(3)])
    assert [row.begins_with(ints(*own)) for own in ((5,), (5, 6), (5, 6, 7), (5, 7), (6,))] == [
        True, True, False, False, False,
    ]  # fmt: skip
    rest = row.without(2)
    assert (rest.input_ids.tolist(), rest.branch_ids.tolist()) == ([7, 1], [0, 1])
    assert rest.logit_positions.tolist() == [0, 1]
    rest.check(vocab_size=10, max_seq_len=2)


def test_labels_that_are_the_same_tokens_are_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompter = Prompter(ScoringProfile(), tokenizer)
    monkeypatch.setattr(tokenizer, "encode_continuation", lambda text: ints(*text.lower().encode()))
    with pytest.raises(ScoringProfileError, match="labels 'Yes' and 'yes' have the same tokens: drop one"):
        prompter.row("x", None, ("Yes", "yes"))


# Probabilities


def test_scores_are_means_over_a_labels_tokens_or_their_sum() -> None:
    log_probs, targets = np.array([-1.0, -2.0, -4.0, -9.0]), ints(0, 1, 1, -1)
    sums, means = label_scores(log_probs, targets, 2, "mean")
    assert (sums.tolist(), means.tolist()) == ([-1.0, -6.0], [-1.0, -3.0])
    assert label_scores(log_probs, targets, 2, "sum")[1].tolist() == [-1.0, -6.0]


def test_a_label_that_begins_another_wins_by_its_sum_always_and_by_its_mean_only_where_it_should() -> None:
    # "fraud" and "fraud|ulent": the second's tokens begin with the first's.
    log_probs, targets = np.array([-3.0, -3.0, -0.1]), ints(0, 1, 1)
    assert label_scores(log_probs, targets, 2, "sum")[1].argmax() == 0
    assert label_scores(log_probs, targets, 2, "mean")[1].argmax() == 1


def calibration(**changes: Any) -> ProbabilityCalibration:
    values: dict[str, Any] = {"labels": ("a", "b"), "temperature": 2.0, "biases": (0.0, 1.0), "method": "bias"}
    return ProbabilityCalibration(**{**values, "normalisation": "mean", "report": {"examples": 20}, **changes})


def test_bias_comes_before_temperature() -> None:
    found = calibration().probabilities(np.array([[0.0, -1.0], [3.0, 0.0]]))
    np.testing.assert_allclose(found, [[0.5, 0.5], softmax(np.array([3.0, 1.0]) / 2).tolist()])
    np.testing.assert_allclose(softmax(np.array([[1e4, 0.0]])), [[1.0, 0.0]])


def test_a_head_takes_the_scores_place() -> None:
    fitted = calibration(head=LinearHead(((1.0, 0.0), (0.0, 1.0)), (0.0, 0.5)), temperature=1.0, biases=(0.0, 0.0))
    found = fitted.probabilities(np.array([[9.0, -9.0]]), np.array([[1.0, 2.0]]))
    np.testing.assert_allclose(found, softmax(np.array([[1.0, 2.5]])))
    with pytest.raises(ProbabilityCalibrationError, match="needs the hidden state"):
        fitted.probabilities(np.array([[9.0, -9.0]]))


@pytest.mark.parametrize("head", [None, LinearHead(((1.0, 0.5), (0.0, 1.0)), (0.0, 0.5))])
def test_a_calibration_reads_back(head: LinearHead | None, tmp_path: Path) -> None:
    assert ProbabilityCalibration.load(tmp_path) is None
    fitted = calibration(head=head)
    (tmp_path / "calibration.json").write_text(fitted.to_json())
    assert ProbabilityCalibration.load(tmp_path) == fitted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"biases": [1.0]}, "biases is"),
        ({"format": 9}, "not a calibration of format 1"),
        ({"head": {"weights": [[1.0]], "biases": [0.0]}}, "head has 1 rows for 2 labels"),
        ({"labels": 3}, "is damaged"),
    ],
)
def test_a_damaged_calibration_names_its_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**json.loads(calibration().to_json()), **change}))
    with pytest.raises(ProbabilityCalibrationError, match=message) as caught:
        ProbabilityCalibration.load(tmp_path)
    assert str(path) in str(caught.value)
    path.write_text("{")
    with pytest.raises(ProbabilityCalibrationError, match="can't be read"):
        ProbabilityCalibration.load(tmp_path)


def test_a_row_is_what_its_fields_say() -> None:
    assert len(ROW) == 4 and isinstance(ROW, ScoreRow)
