"""A built model's settings: changed by `configure`, kept by the next build, and edits by hand told."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.models.built import BuiltModel
from deepseek_triton.builders.repository.models.configure import configure
from deepseek_triton.builders.repository.options import BuildOptions, setting_words
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions
from deepseek_triton.builders.tune.repository import finish_pending
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.protocol.settings import EngineSettings, to_text
from tests.support.tuning import tiny_repository

ROOT = Path(__file__).parents[3]
NOT_DEFAULT = not EngineSettings.nv_trt_llm_metrics
# Another value for each setting of the tiny models `g`, which generates, and `s`, which scores.
GENERATING: dict[str, Any] = {
    "max_num_seqs": 5, "max_num_batched_tokens": 9, "max_prefill_stall": 2.5, "prefix_reuse": "off", "num_threads": 2,
    "max_queue_size": 6, "priority_levels": 4, "queue_timeout_ms": 10, "timeout_ms": 20, "cancel_after_s": 0.5,
    "tokenizer_instances": 2, "nv_trt_llm_metrics": NOT_DEFAULT,
}  # fmt: skip
SCORING: dict[str, Any] = {
    "num_threads": 2, "max_pass_tokens": 100, "max_batch_size": 6, "preferred_batch_sizes": (2, 3),
    "max_queue_delay_us": 700, "queue_timeout_us": 9, "max_queue_size": 6, "engine_instances": 2,
    "tokenizer_instances": 2, "scorer_instances": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def models(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built.parent, tmp_path / "work")
    return tmp_path / "work" / built.name


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def words(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in setting_words(name, value)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "values"), [("g", GENERATING), ("s", SCORING)])
def test_every_setting_is_changed_without_a_build_and_both_files_agree(
    name: str, values: dict[str, Any], models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(models)
    assert set(BuiltModel.read(models, name).settings()) == set(values), "a new setting needs a value here"
    assert cli.main(["configure", name, "--repository", str(models), *words(values)]) == 0
    out = capsys.readouterr().out
    for setting, value in values.items():
        assert re.search(rf"^{setting}: \S* → {re.escape(to_text(value))}$", out, re.MULTILINE), setting
    assert "must be ended and started again: deepseek-triton serve" in out
    model = BuiltModel.read(models, name)
    assert model.settings() == values and model.edited == [] and check_repository(models) == []
    command = Manifest.load(models / f"{name}-engine" / "1").command
    for setting, value in values.items():
        assert " ".join(setting_words(setting, value)) in command
    changed = {path for path, data in snapshot(models).items() if before.get(path) != data}
    assert changed <= {f"{part}/config.pbtxt" for part in model.texts} | {f"{name}-engine/1/manifest.json"}
    # The same again changes nothing.
    after = snapshot(models)
    assert cli.main(["configure", name, "--repository", str(models), *words(values)]) == 0
    assert snapshot(models) == after and "has these settings already" in capsys.readouterr().out
    assert cli.main(["configure", name, "--repository", str(models), "--reset-settings"]) == 0
    model = BuiltModel.read(models, name)
    assert model.settings() == model.defaults()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["g", "--max-queue-size", "0"], "max_queue_size is 0, must be an integer of at least 1"),
        (["g", "--max-num-batched-tokens", "65"], "max_num_batched_tokens is 65, must be at most max_seq_len"),
        (["g", "--batch-invariant"], "batch_invariant is no setting of g, which has task generate and target onnx"),
        (["g", "--max-batch-size", "4"], "max_batch_size is no setting of g"),
        (["s", "--max-num-seqs", "4"], "max_num_seqs is no setting of s"),
        (["s", "--preferred-batch-sizes", "99"], "preferred_batch_sizes has 99, must be 1 to max_batch_size"),
        (["g", "--num-threads", "100000000"], "num_threads is 100000000, must be at most 1024"),
        (["g", "--tokenizer-instances", "100000000"], "tokenizer_instances is 100000000, must be at most 64"),
        (
            ["g", "--max-num-seqs", "100000000"],
            r"max_num_seqs is 100,000,000: caches .* at most [\d,]+ fit; use --max-",
        ),
        (["g", "--max-num-seqs", "20000000", "--memory", "1"], "--memory 1 has 1.0 GiB: at most"),
        (["g", "--timeout-ms", "5", "--memory", "h100"], "memory is 'h100', a GPU, but the model runs on a CPU"),
        (["g"], "no setting was given"),
        (["nobody", "--timeout-ms", "5"], "has no model 'nobody'; there are g, s"),
        (["g-engine", "--timeout-ms", "5"], "g-engine is a part of g"),
        (
            ["g", "--max-seq-len", "64"],
            "max_seq_len is fixed when a model is built; rebuild with: .* --max-seq-len 64$",
        ),
        (["g", "--precision", "fp16"], "precision is fixed .* --precision fp16$"),
        (["g", "--target", "cuda", "--keep", "x"], "target, keep are fixed .* --target cuda --keep x$"),
        (["s", "--labels", "a,b"], "labels is fixed .*rebuild with: deepseek-triton build .* --labels a,b$"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    arguments: list[str], message: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(models)
    name, *rest = arguments
    assert cli.main(["configure", name, "--repository", str(models), *rest]) == 1
    assert re.search(message, capsys.readouterr().err.rstrip())
    assert snapshot(models) == before


def test_what_a_plan_was_compiled_for_needs_a_build(models: Path) -> None:
    model = BuiltModel.read(models, "g")
    path = model.version_dir(1) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target": "tensorrt", "engine": {"max_num_seqs": 4}}))
    assert configure(BuiltModel.read(models, "g"), {"max_num_seqs": 4})
    with pytest.raises(BuildError, match=r"compiled for 4; to have more, rebuild with: .* --max-num-seqs 5$"):
        configure(BuiltModel.read(models, "g"), {"max_num_seqs": 5})


def checkpoint_of(models: Path) -> Path:
    return next(path for path in models.parent.iterdir() if (path / "config.json").is_file())


def rebuild(models: Path, **more: Any) -> list[str]:
    said: list[str] = []
    build(BuildOptions(checkpoint_of(models), "g", models, **{"max_seq_len": 32, **more}), say=said.append)
    return said


@pytest.mark.slow
def test_a_rebuild_keeps_what_was_set_and_says_so(models: Path) -> None:
    configure(BuiltModel.read(models, "g"), GENERATING)
    (line,) = rebuild(models, settings={"timeout_ms": 30})
    kept = {**GENERATING, "timeout_ms": 30}
    assert BuiltModel.read(models, "g").settings() == kept
    assert line.startswith("kept from before: ") and "--reset-settings" in line
    assert "max_queue_size 6" in line and "prefix_reuse off" in line and " timeout_ms" not in line
    command = Manifest.load(models / "g-engine" / "2").command
    assert "--max-queue-size 6" in command and "--tokenizer-instances 2" in command and "--timeout-ms 30" in command
    lines = rebuild(models, max_seq_len=8)
    assert lines[-1] == "max_num_batched_tokens 9 was lowered to 8, this build's max_seq_len"
    (line,) = rebuild(models, reset_settings=True)
    assert line.startswith("reset to the defaults: ") and "prefix_reuse off" in line
    model = BuiltModel.read(models, "g")
    assert model.settings() == model.defaults()
    assert rebuild(models) == []


@pytest.mark.slow
def test_a_rebuild_for_another_task_says_what_it_cannot_keep(models: Path) -> None:
    configure(BuiltModel.read(models, "g"), {"prefix_reuse": "off", "num_threads": 2, "tokenizer_instances": 2})
    lines = rebuild(models, task="score")
    assert lines[0].startswith("not kept, since target onnx with task score has no such setting: ")
    assert "prefix_reuse off" in lines[0]
    model = BuiltModel.read(models, "g")
    assert model.task == "score" and model.settings()["tokenizer_instances"] == model.settings()["num_threads"] == 2
    configure(model, {"max_batch_size": 4, "preferred_batch_sizes": (2,), "scorer_instances": 2, "max_pass_tokens": 99})
    before = BuiltModel.read(models, "g").settings()
    assert any("max_batch_size 4" in line for line in rebuild(models, task="score"))
    assert BuiltModel.read(models, "g").settings() == before
    lower = ScoringOptions(batching=Batching(max_batch_size=2))
    assert not any("preferred_batch_sizes 2" in line for line in rebuild(models, task="score", scoring=lower))


@pytest.mark.slow
def test_a_given_default_wins_over_what_was_kept(models: Path) -> None:
    configure(BuiltModel.read(models, "s"), {"max_batch_size": 4, "max_pass_tokens": 99})
    arguments = [
        "build", checkpoint_of(models), "--name", "s", "--repository", models, "--task", "score", "--max-seq-len", "64",
        "--max-batch-size", "16", "--max-pass-tokens", "512", "-q",
    ]  # fmt: skip
    assert cli.main([str(word) for word in arguments]) == 0
    settings = BuiltModel.read(models, "s").settings()
    assert (settings["max_batch_size"], settings["max_pass_tokens"]) == (16, 512)


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


@pytest.mark.slow
def test_an_edit_by_hand_is_told_and_its_settings_are_kept(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine, tokenizer = models / "g-engine" / "config.pbtxt", models / "g-tokenizer" / "config.pbtxt"
    limit = "default_queue_policy { max_queue_size: 7 }"
    edit(engine, '"prompt"', '"off"')
    edit(tokenizer, "max_batch_size: 64", f"max_batch_size: 64\ndynamic_batching {{\n  {limit}\n}}")
    assert cli.main(["check", str(models)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{models}: sound\n"
    assert told.err.splitlines() == [
        f"{path} was edited by hand; use `deepseek-triton configure`, which a build keeps"
        for path in (engine, tokenizer)
    ]
    # configure keeps the edit and its mark
    assert cli.main(["configure", "g", "--repository", str(models), "--timeout-ms", "5"]) == 0
    assert f"{tokenizer} was edited by hand" in capsys.readouterr().out
    model = BuiltModel.read(models, "g")
    assert model.edited == [tokenizer, engine] and model.settings()["prefix_reuse"] == "off"
    assert "max_queue_size: 7" in tokenizer.read_text()
    lines = rebuild(models)
    assert "prefix_reuse off" in lines[0] and "timeout_ms 5" in lines[0]
    assert any(line.startswith(f"{tokenizer} was edited") and "anew: dynamic_batching" in line for line in lines)
    assert any(line.startswith(f"{engine} was edited") and "what was set is kept" in line for line in lines)
    assert BuiltModel.read(models, "g").edited == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"prompt"', '"some"', "can't be kept: .*prefix_reuse is 'some'"),
        ("parameters {", "parameter {", "can't be kept: .*config.pbtxt:"),
        (
            'key: "max_queue_size"',
            'key: "max_queue"',
            "was edited by hand: the build wrote these anew: max_queue, max_queue_size",
        ),
    ],
)
def test_a_broken_edit_is_told_and_replaced(before: str, after: str, message: str, models: Path) -> None:
    edit(models / "g-engine" / "config.pbtxt", before, after)
    assert any(re.search(message, line) for line in rebuild(models))
    assert check_repository(models) == [] and BuiltModel.read(models, "g").edited == []


WRITER = """
import sys
from pathlib import Path
from deepseek_triton.builders.repository.models.built import BuiltModel
from deepseek_triton.builders.repository.models.configure import configure
from tests.support.killed_writer import kill_after

models = Path(sys.argv[1])
kill_after(int(sys.argv[2]))
configure(BuiltModel.read(models, "s"), {"max_batch_size": 2, "scorer_instances": 2})
"""


@pytest.mark.slow
def test_a_kill_while_configuring_leaves_the_old_or_the_new(models: Path) -> None:
    before = snapshot(models)
    ends = []
    for num_renames in range(6):
        command = [sys.executable, "-c", WRITER, str(models), str(num_renames)]
        done = subprocess.run(command, cwd=ROOT, check=False)
        assert done.returncode == (-signal.SIGKILL if num_renames < 5 else 0)
        assert bool(finish_pending(models, "configure")) == (0 < num_renames < 5)
        assert check_repository(models) == []
        model = BuiltModel.read(models, "s")
        assert ("--max-batch-size 2" in model.manifest.command) == (model.settings()["max_batch_size"] == 2)
        ends.append((model.settings()["max_batch_size"], model.settings()["scorer_instances"]))
        assert not list(models.glob(".*.json"))
        for path, data in before.items():
            (models / path).write_bytes(data)
    assert ends == [(8, 1)] + [(2, 2)] * 5


def break_config(models: Path, part: str, pattern: str, replacement: str) -> None:
    path = models / part / "config.pbtxt"
    text = path.read_text()
    assert re.search(pattern, text), text
    path.write_text(re.sub(pattern, replacement, text, count=1))


# What somebody may have written by hand, and how it is mended.
PARAMETER = r'(key: "{}"\s+value \{{\s+string_value: )"[^"]*"'
UNREADABLE = {
    "no number": ("g", "g-engine", PARAMETER.format("max_queue_size"), r'\1"many"', "--max-queue-size 7"),
    "out of range": ("g", "g-engine", PARAMETER.format("max_queue_size"), r'\1"-5"', "--max-queue-size 7"),
    "empty": ("g", "g-engine", PARAMETER.format("timeout_ms"), r'\1""', "--timeout-ms 7"),
    "no choice": ("g", "g-engine", PARAMETER.format("prefix_reuse"), r'\1"yes"', "--prefix-reuse all"),
    "no flag": ("g", "g-engine", PARAMETER.format("nv_trt_llm_metrics"), r'\1"1"', "--nv-trt-llm-metrics"),
    "a misspelt name": ("g", "g-engine", '"timeout_ms"', '"timeuot_ms"', None),
    "no process": ("g", "g-tokenizer", r"count: \d", "count: 0", "--tokenizer-instances 2"),
    "no group": ("g", "g-tokenizer", r"instance_group \{[^}]*\}", "", "--tokenizer-instances 2"),
    "a scorer's": ("s", "s-engine", PARAMETER.format("max_pass_tokens"), r'\1"x"', "--max-pass-tokens 70"),
    "no field": ("g", "g-engine", "max_batch_size: 64", "max_batch_size: many", None),
    "half a file": ("g", "g-engine", r"(?s)parameters.*", "parameters {", None),
    "of a plan of steps": ("g", "g", "ensemble_scheduling", "ensemble_schedule", None),
    "of a tokenizer": ("s", "s-tokenizer", "backend", "bakcend", None),
    "of a scorer": ("s", "s-scorer", "backend", "bakcend", None),
    "nothing": ("s", "s", r"(?s).*", "}", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", UNREADABLE)
def test_what_cannot_be_read_is_mended(fault: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, part, pattern, replacement, option = UNREADABLE[fault]
    configure(BuiltModel.read(models, name), {}, is_reset=True)
    pristine = {part: config.SerializeToString(deterministic=True) for part, config in _configs(models, name).items()}
    break_config(models, part, pattern, replacement)
    broken = snapshot(models)
    configure_it = ["configure", name, "--repository", str(models)]
    # Another setting isn't changed beside it, and the error says what is wrong and how to go on.
    assert (
        cli.main([*configure_it, "--tokenizer-instances" if "max" in (option or "") else "--max-queue-size", "3"]) == 1
    )
    assert "--reset-settings" in capsys.readouterr().err and snapshot(models) == broken
    for command in (["list", str(models)], ["inspect", name, "--repository", str(models)]):
        assert cli.main([*command, "--url", "localhost:1"]) == 0
        out = capsys.readouterr().out
        assert command[0] == "list" or "--reset-settings" in out
    if option:
        assert cli.main([*configure_it, *option.split()]) == 0
        assert "unreadable → " in capsys.readouterr().out
        assert check_repository(models) == []
        break_config(models, part, pattern, replacement)
    assert cli.main([*configure_it, "--reset-settings"]) == 0
    out = capsys.readouterr().out
    assert "unreadable → " in out or "couldn't be read: it was written anew" in out
    model = BuiltModel.read(models, name)
    assert model.settings() == model.defaults() and check_repository(models) == []
    assert {part: c.SerializeToString(deterministic=True) for part, c in _configs(models, name).items()} == pristine


def _configs(models: Path, name: str) -> dict[str, Any]:
    return BuiltModel.read(models, name).configs


def test_a_configuration_that_is_gone_is_written_anew(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure(BuiltModel.read(models, "g"), {}, is_reset=True)
    before = snapshot(models)
    for part in ("g", "g-engine", "g-detokenizer"):
        (models / part / "config.pbtxt").unlink()
    assert cli.main(["configure", "g", "--repository", str(models), "--reset-settings"]) == 0
    assert capsys.readouterr().out.count("it was written anew") == 3
    assert snapshot(models) == before
