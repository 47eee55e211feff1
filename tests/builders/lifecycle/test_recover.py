"""Recovery: a student comes nearer to its teacher, a killed run goes on as if nothing had happened, errors are told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.checkpoint.reader import Checkpoint, open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.fp8.texts.calibration_text import load_tokenizer
from deepseek_triton.builders.lifecycle.provenance import provenance_of
from deepseek_triton.builders.lifecycle.pruning.options import PruneOptions
from deepseek_triton.builders.lifecycle.pruning.prune import prune
from deepseek_triton.builders.lifecycle.recovery.options import RecoverOptions
from deepseek_triton.builders.lifecycle.recovery.recover import recover
from deepseek_triton.builders.lifecycle.recovery.state import STATE, state_directory, training_state
from deepseek_triton.builders.lifecycle.recovery.windows import Windows
from tests.support.checkpoints import load_reference, make_checkpoint, make_tokenizer

torch = pytest.importorskip("torch")
if find_spec("peft") is None:  # to import it takes seconds of every run of any test
    pytest.skip("peft is not installed: pip install '.[train]'", allow_module_level=True)

Array = np.ndarray[Any, np.dtype[Any]]
FAST: dict[str, Any] = {
    "steps": 8, "batch_size": 2, "micro_batch": 2, "window_len": 32, "learning_rate": 1e-3, "evaluate_every": 4,
    "save_every": 1, "device": "cpu",
}  # fmt: skip

LONGER: dict[str, Any] = {"steps": 16, "batch_size": 8, "micro_batch": 8, "evaluate_every": 8}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a teacher, its pruned student, and a text: each option's is made once, and copied."""

    @cache
    def make(option: str) -> Path:
        folder = tmp_path_factory.mktemp("family")
        teacher = make_tokenizer(make_checkpoint(folder / "teacher", option))
        text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 3000)))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        prune(PruneOptions(teacher, folder / "student", ratio=0.3, method="l1", multiple_of=1))
        return folder

    return make


@pytest.fixture
def family(families: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[Path, Path, Path]]:
    """A teacher, its pruned student, and a text."""

    def make(option: str = "llama") -> tuple[Path, Path, Path]:
        shutil.copytree(families(option), tmp_path, dirs_exist_ok=True)
        return tmp_path / "teacher", tmp_path / "student", tmp_path / "text.txt"

    return make


def options(family: tuple[Path, Path, Path], **more: Any) -> RecoverOptions:
    teacher, student, text = family
    values: dict[str, Any] = {"output": student.parent / "recovered", **FAST, **more}
    return RecoverOptions(student, teacher, text, **values)


def tensors(path: Path) -> dict[str, Array]:
    checkpoint: Checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.spec.tensor_shapes()}


def assert_equal(one: Path, other: Path) -> None:
    expected = tensors(other)
    for name, array in tensors(one).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "rank"), [("llama", None), ("llama", 4), ("qwen2-tied-yarn", None), ("v3", None)])
def test_the_student_comes_nearer_to_its_teacher(option: str, rank: int | None, family: Any) -> None:
    made = family(option)
    lines: list[str] = []
    recovered = recover(
        options(made, lora_rank=rank, **{**LONGER, "learning_rate": 1e-2 if rank else 1e-3}), say=lines.append
    )
    assert recovered.after.kl < recovered.before.kl * 0.97
    assert recovered.after.step > 0 and recovered.before.step == 0
    assert [judgement.step for judgement in recovered.judgements] == [0, 8, 16]
    assert sum("held-out perplexity" in line for line in lines) == 3
    found = load_reference(recovered.output)
    assert open_checkpoint(recovered.output).spec == open_checkpoint(made[1]).spec
    text = made[2].read_text()[-64:]  # held out
    ids = torch.tensor(load_tokenizer(open_checkpoint(made[0])).encode(text).astype(np.int64))[None]
    with torch.no_grad():
        teacher, before = (load_reference(path)(ids).logits.log_softmax(-1) for path in made[:2])
        after = found(ids).logits.log_softmax(-1)
    far, near = (
        torch.nn.functional.kl_div(one, teacher, reduction="batchmean", log_target=True) for one in (before, after)
    )
    assert near < far
    assert not state_directory(recovered.output).exists()


@pytest.mark.slow
def test_the_provenance_names_student_teacher_and_text(family: Any) -> None:
    made = family()
    recovered = recover(options(made, steps=1))
    values = provenance_of(recovered.output)
    assert (values["step"], values["parent"], values["settings"]["teacher"]) == ("recover", "student", "teacher")
    assert values["settings"]["learning_rate"] == 1e-3 and list(values["data"]) == ["text.txt"]
    assert values["origin"] == provenance_of(made[1])
    assert values["settings"]["teacher_sha256"] == values["origin"]["parent_sha256"]


class Killed(BaseException):
    """Ends a run as a signal would: nothing of it is handled."""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 4])
def test_a_run_that_was_ended_goes_on_as_if_nothing_had_happened(rank: int | None, family: Any) -> None:
    made = family()
    whole = recover(options(made, output=made[1].parent / "whole", lora_rank=rank))
    taken: list[int] = []

    def end(what: str, done: int, total: int) -> None:
        taken.append(done)
        if len(taken) in (3, 5):  # in the second run after two steps more
            raise Killed

    broken = options(made, lora_rank=rank)
    for _ in range(2):
        with pytest.raises(Killed):
            recover(broken, report=end)
    assert not broken.output.exists()
    lines: list[str] = []
    recovered = recover(broken, report=lambda what, done, total: taken.append(done), say=lines.append)
    assert lines[0].startswith("goes on from step ")
    assert taken == [1, 2, 3, 3, 4, 4, 5, 6, 7, 8]
    assert recovered.judgements == whole.judgements
    assert_equal(recovered.output, whole.output)


@pytest.mark.slow
def test_kill_minus_9_and_the_same_command(family: Any, tmp_path: Path) -> None:
    teacher, student, text = family()
    output = tmp_path / "recovered"
    numbers = {"steps": 24, "batch-size": 2, "window": 32, "evaluate-every": 8, "patience": 99, "save-every": 4}
    words = ["recover", str(student), "--teacher", str(teacher), "--text", str(text), "--output", str(output)]
    words += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    program = "import sys; from deepseek_triton.builders.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (state_directory(output) / STATE).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert cli.main([*words, "-q"]) == 0
    whole = [str(tmp_path / "whole") if word == str(output) else word for word in words]
    assert cli.main([*whole, "-q"]) == 0
    assert_equal(output, tmp_path / "whole")


@pytest.mark.slow
def test_it_stops_where_nothing_gets_better_and_keeps_the_best(family: Any) -> None:
    made = family()
    far = {"learning_rate": 30.0, "evaluate_every": 1, "patience": 2, "steps": 50, "kl_weight": 1.0}
    recovered = recover(options(made, **far))
    assert recovered.num_steps < 50
    assert recovered.after.objective == min(one.objective for one in recovered.judgements)
    assert recovered.judgements.index(recovered.after) == len(recovered.judgements) - 3
    if recovered.after.step == 0:
        assert_equal(recovered.output, made[1])


@pytest.mark.slow
def test_another_run_s_state_is_not_taken(family: Any) -> None:
    made = family()

    def end(what: str, done: int, total: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        recover(options(made), report=end)
    with pytest.raises(BuildError, match="had another learning_rate, steps; run it as it was, or begin anew"):
        recover(options(made, steps=3, learning_rate=1e-4))
    recovered = recover(options(made, steps=3, learning_rate=1e-4, restarts=True))
    assert recovered.num_steps == 3


def test_two_processes_don_t_train_one_output(tmp_path: Path) -> None:
    with (
        training_state(tmp_path / "out", {}, restarts=False),
        pytest.raises(BuildError, match="is being recovered by another process"),
        training_state(tmp_path / "out", {}, restarts=False),
    ):
        pass


def test_a_damaged_state_is_told(tmp_path: Path) -> None:
    with training_state(tmp_path / "out", {}, restarts=False) as state:
        (state.directory / STATE).write_bytes(b"not a state")
        with pytest.raises(BuildError, match="is damaged; begin anew with --restart"):
            state.load()


def test_an_epoch_has_every_window_once() -> None:
    windows = Windows(np.arange(10)[:, None], np.zeros((1, 1), np.int64), {})
    rows = np.concatenate([windows.batch(step, 4, seed=3)[:, 0] for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(rows[10:]) != list(range(10))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps is 0, must be at least 1"),
    ({"batch_size": -1}, "batch-size is -1"),
    ({"learning_rate": 0.0}, "learning-rate is 0.0, must be a number above 0"),
    ({"learning_rate": float("nan")}, "learning-rate is nan"),
    ({"kl_weight": 1.5}, "kl-weight is 1.5, must lie between 0 and 1"),
    ({"kl_weight": float("nan")}, "kl-weight is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"lora_rank": 0}, "lora-rank is 0"),
    ({"window_len": 1}, "window is 1"),
    ({"window_len": 9999}, "window is 9999, the models were made for 256 tokens"),
    ({"window_len": 256, "text": "short"}, "less than two windows"),
    ({"held_out": "missing"}, "missing.txt: No such file"),
    ({"teacher": "other"}, "has 320 tokens, .* 288"),
    ({"output": "student"}, "exists"),
    ({"device": "gpu"}, "torch sees no GPU"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_can_t_be_done_is_told(changes: dict[str, Any], message: str, family: Any, tmp_path: Path) -> None:
    if changes.get("device") == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    teacher, student, text = family()
    if changes.get("teacher") == "other":
        teacher = make_tokenizer(make_checkpoint(tmp_path / "other", vocab_size=288, eos_token_id=287), 288)
    if changes.get("text") == "short":
        text.write_text("a few words", encoding="utf-8")
    changes = {key: value for key, value in changes.items() if key not in ("teacher", "text")}
    for key, name in (("held_out", "missing.txt"), ("output", "student")):
        if key in changes:
            changes[key] = tmp_path / name
    with pytest.raises(BuildError, match=message):
        recover(options((teacher, student, text), **changes))


@pytest.mark.slow
def test_the_command(family: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    teacher, student, text = family()
    words = ["recover", str(student), "--teacher", str(teacher), "--text", str(text), "--output", str(tmp_path / "out")]
    numbers = ["--steps", "2", "--batch-size", "2", "--window", "32", "--evaluate-every", "1"]
    assert cli.main([*words, *numbers, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 2 and [one["step"] for one in told["judgements"]] == [0, 1, 2]
