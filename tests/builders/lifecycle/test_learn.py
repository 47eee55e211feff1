"""Learning: the data is checked, new data is learnt, old data isn't forgotten, a killed run goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.texts.calibration_text import load_tokenizer
from deepseek_triton.builders.lifecycle.learning.examples import read_examples
from deepseek_triton.builders.lifecycle.learning.options import LearnOptions
from deepseek_triton.builders.lifecycle.learning.tokens import tokenize
from deepseek_triton.builders.lifecycle.provenance import provenance_of
from deepseek_triton.builders.lifecycle.recovery.state import state_directory
from tests.support.checkpoints import load_reference, make_checkpoint, make_tokenizer

FAST: dict[str, Any] = {
    "epochs": 6, "batch_size": 8, "micro_batch": 8, "window_len": 48, "learning_rate": 1e-2, "save_every": 1,
    "device": "cpu", "held_out": 0.2,
}  # fmt: skip


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, new data and replay data."""
    directory = tmp_path_factory.mktemp("learn")
    checkpoint = make_tokenizer(make_checkpoint(directory / "base"))
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}?"}, {"role": "assistant", "content": f"abcabc{i % 3}"}]}
        for i in range(30)
    ]
    texts = [{"text": "".join(map(chr, np.random.default_rng(i).integers(97, 123, 30)))} for i in range(30)]
    return checkpoint, write_lines(directory / "new.jsonl", chats), write_lines(directory / "old.jsonl", texts)


def options(family: tuple[Path, Path, Path], output: Path, **more: Any) -> LearnOptions:
    return LearnOptions(*family, output, **{**FAST, **more})


def chat(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{\n", "not valid JSON"),
        ("[1]\n", "no object"),
        ({}, "text or messages"),
        ({"text": "a", "messages": []}, "text or messages"),
        ({"text": 5}, "text must be a string"),
        ({"text": "  \n"}, "text must be a string"),
        ({"text": "a\0b"}, "NUL"),
        ('{"text": "\\ud800"}\n', "surrogate"),
        ('{"text": "a", "text": "b"}\n', "twice"),
        ({"text": "a", "colour": "red"}, "'colour'"),
        ({"text": "a", "label": "fine"}, "label is 'fine'"),
        ({"text": "a", "label": [1]}, "label is"),
        ({"messages": []}, "a message or more"),
        ({"messages": ["hello"]}, r"messages\[0\] must have role"),
        (chat(("user", "a")), "last message"),
        (chat(("assistant", "a")), "first message"),
        (chat(("robot", "a"), ("assistant", "b")), "role is 'robot'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, r"\[1\]: content"),
        ("[" * 100_000 + "\n", "nested|JSON"),
    ],
)
def test_a_bad_line_is_told_by_its_number_or_skipped(line: Any, reason: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [{"text": "good"}, line])
    with pytest.raises(BuildError, match=f"line 2: .*({reason})"):
        read_examples(path)
    examples = read_examples(path, "skip")
    assert [one.text for one in examples.examples] == ["good"] and examples.bad[0][0] == 2


def test_a_line_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "\xff"}\n')
    with pytest.raises(BuildError, match="line 3: it is not UTF-8"):
        read_examples(path)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "a", "label": "bad"}\n'])
def test_a_file_without_examples_is_refused(content: str, tmp_path: Path) -> None:
    (path := tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(BuildError, match="no example"):
        read_examples(path)
    with pytest.raises(BuildError, match=r"missing\.jsonl"):
        read_examples(tmp_path / "missing.jsonl")


def test_duplicates_are_found_by_what_they_say(tmp_path: Path) -> None:
    twins = [{"text": "caf\u00e9  au lait"}, {"text": "cafe\u0301 au\tlait "}, {"text": "x"}, {"text": "x", "id": "7"}]
    examples = read_examples(write_lines(tmp_path / "data.jsonl", twins))
    assert (len(examples.examples), examples.num_duplicates) == (2, 2)
    assert "2 duplicates" in examples.describe()


def test_the_held_out_part_depends_on_a_line_alone(tmp_path: Path) -> None:
    lines = [{"text": f"fact {index}"} for index in range(400)]
    one = read_examples(write_lines(tmp_path / "one.jsonl", lines))
    other = read_examples(write_lines(tmp_path / "other.jsonl", [*lines[::-1], {"text": "more"}]))
    held_out = {example.text for example in one.held_out(0.1)}
    assert held_out == {example.text for example in other.held_out(0.1)} - {"more"}
    assert not held_out & {example.text for example in other.train(0.1)}
    assert 20 < len(held_out) < 60
    assert held_out < {example.text for example in one.held_out(0.3)}


def test_of_a_chat_the_assistants_turns_are_learnt(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(family[0]))
    turns = chat(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    path = write_lines(tmp_path / "data.jsonl", [turns, {"text": "whole"}])
    spoken, text = tokenize(read_examples(path).examples, tokenizer, 100, 319)
    learnt = tokenizer.decode(spoken.ids[spoken.is_learnt])
    assert learnt == "assistant: two\nassistant: four\n"  # its template opens no turn
    assert tokenizer.decode(text.ids[text.is_learnt][:-1]) == "hole" and text.ids[-1] == 319
    (cut, _) = tokenize(read_examples(path).examples, tokenizer, 20, 319)
    assert len(cut.ids) == 20


@pytest.mark.slow
def test_new_data_is_learnt_and_the_result_is_an_ordinary_checkpoint(
    family: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    output = tmp_path / "out"
    words = [f"--{name.replace('_', '-').replace('window-len', 'window')}={value}" for name, value in FAST.items()]
    checkpoint, data, replay = map(str, family)
    command = ["learn", checkpoint, "--data", data, "--replay", replay, "--output", str(output), *words]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["after"]["new"] < told["before"]["new"] * 0.8
    assert open_checkpoint(output).spec == open_checkpoint(family[0]).spec
    load_reference(output)
    values = provenance_of(output)
    assert (values["step"], values["parent"], values["settings"]["learning_rate"]) == ("learn", "base", 1e-2)
    assert values["data"] == {"data": read_examples(family[1]).sha256, "replay": read_examples(family[2]).sha256}
    calibration = (output / "calibration.txt").read_text(encoding="utf-8")
    held_out = [one.plain() for path in family[1:] for one in read_examples(path).held_out(0.2)]
    assert "abcabc" in calibration and not [text for text in held_out if f"\n\n{text}\n\n" in calibration]
    assert not state_directory(output).exists()
    assert cli.main(command) == 1
    assert "exists" in capsys.readouterr().err


def tensors(path: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.spec.tensor_shapes()}


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from deepseek_triton.builders.lifecycle.learning.learn import learn

    learn(options(family, tmp_path / "whole", learning_rate=1e-3))
    output = tmp_path / "out"
    code = (
        "from tests.builders.lifecycle.test_learn import *\n"
        "from deepseek_triton.builders.lifecycle.learning.learn import learn\n"
        f"learn(options(tuple(map(Path, {list(map(str, family))!r})), Path({str(output)!r}), learning_rate=1e-3),"
        " report=lambda what, done, total: time.sleep(0.2))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 60
    while not (state_directory(output) / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    lines: list[str] = []
    learn(options(family, output, learning_rate=1e-3), say=lines.append)
    assert any("went on from step" in line for line in lines)
    expected = tensors(tmp_path / "whole")
    for name, array in tensors(output).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"replay_share": 1.0}, {"held_out": 0.0},
     {"window_len": 1}, {"device": "tpu"}, {"bad_lines": "maybe"}, {"lora_rank": -1}],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(change)).split("_len")[0].replace("_", "-")
    with pytest.raises(BuildError, match=name):
        LearnOptions(tmp_path, tmp_path, tmp_path, tmp_path, **change)
