from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.check import (
    CheckError,
    check_repository,
    require_sound,
    sound_models,
    unbuilt_models,
)
from deepseek_triton.builders.repository.check_engine import check_engine_files
from deepseek_triton.ensemble.artefacts.manifest import ArtefactFile, Manifest
from deepseek_triton.ensemble.protocol.pipelines import GENERATE_PIPELINE
from deepseek_triton.ensemble.protocol.settings import EngineSettings

Edit = Callable[[pbtxt.ModelConfig], object]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A sound repository with one served model, `m`."""
    root = tmp_path / "models"
    for config in (
        pbtxt.tokenizer_config("m"),
        pbtxt.engine_config("m", EngineSettings().to_parameters()),
        pbtxt.detokenizer_config("m"),
        pbtxt.ensemble_config("m", GENERATE_PIPELINE),
    ):
        version = root / config.name / "1"
        version.mkdir(parents=True)
        (root / config.name / "config.pbtxt").write_text(pbtxt.to_text(config), encoding="utf-8")
        if config.backend == "python":
            (version / "model.py").touch()
    write_engine(root / "m-engine" / "1")
    return root


def write_engine(version_dir: Path) -> None:
    version_dir.mkdir(exist_ok=True)
    (version_dir / "model.py").touch()
    (version_dir / "model.onnx").write_bytes(b"graph")
    Manifest(
        name="m",
        target="onnx",
        precision="fp32",
        checkpoint="c",
        checkpoint_sha256="",
        spec={},
        limits={"max_seq_len": 128},
        end_ids=(0,),
        shapes={},
        versions={},
        requires={},
        files={"model.onnx": ArtefactFile.of(version_dir / "model.onnx")},
        command="deepseek-triton build c",
    ).save(version_dir)


def edit(repository: Path, model: str, change: Edit) -> None:
    path = repository / model / "config.pbtxt"
    config = pbtxt.parse_text(path.read_text(encoding="utf-8"), path)
    change(config)
    path.write_text(pbtxt.to_text(config), encoding="utf-8")


def problems(repository: Path) -> list[str]:
    return [str(problem).replace(f"{repository}/", "") for problem in check_repository(repository)]


def add_model(repository: Path, name: str) -> None:
    """A second model, sound as the first."""
    for part in ("", "-tokenizer", "-engine", "-detokenizer"):
        shutil.copytree(repository / f"m{part}", repository / f"{name}{part}")
        file = repository / f"{name}{part}" / "config.pbtxt"
        file.write_text(re.sub(r'"m(-\w+)?"', rf'"{name}\1"', file.read_text(encoding="utf-8")), encoding="utf-8")


def test_a_model_at_fault_takes_no_other_with_it(repository: Path) -> None:
    add_model(repository, "other")
    everything = sorted(path.name for path in repository.iterdir())
    assert (sorted(sound_models(repository)[0]), sound_models(repository)[1]) == (everything, [])
    (repository / "m-engine/1/model.onnx").unlink()
    sound, found = sound_models(repository)
    assert sorted(sound) == [name for name in everything if name.startswith("other")]
    assert [Path(problem.where).parts[-3:] for problem in found] == [("m-engine", "1", "model.onnx")]
    (repository / "other/config.pbtxt").write_text("name: 5")
    with pytest.raises(CheckError, match=r"model.onnx: is missing[\s\S]*other/config.pbtxt"):
        sound_models(repository)
    (repository / "m-engine/1/model.onnx").write_bytes(b"graph")
    assert sorted(sound_models(repository)[0]) == [name for name in everything if name.startswith("m")]


def test_a_sound_repository_has_no_problems(repository: Path) -> None:
    assert check_repository(repository) == []
    require_sound(repository)


def step(config: pbtxt.ModelConfig, number: int) -> pbtxt.ModelConfig:
    return config.ensemble_scheduling.step[number]


def tensor(tensors: pbtxt.ModelConfig, name: str) -> pbtxt.ModelConfig:
    return next(tensor for tensor in tensors if tensor.name == name)


def put(mapping: pbtxt.ModelConfig, key: str, value: str | None) -> None:
    if value is None:
        del mapping[key]
    else:
        mapping[key] = value


def both(*changes: Edit) -> Edit:
    return lambda config: [change(config) for change in changes]


def swap_steps(config: pbtxt.ModelConfig) -> None:
    steps = list(config.ensemble_scheduling.step)
    del config.ensemble_scheduling.step[:]
    config.ensemble_scheduling.step.extend([steps[1], steps[0], steps[2]])


# What is changed in which model's configuration → every problem that must be found, by its start and end.
EDITS: dict[str, tuple[str, Edit, list[tuple[str, str]]]] = {
    "name": (
        "m-tokenizer",
        lambda c: setattr(c, "name", "other"),
        [("m-tokenizer/config.pbtxt: name is 'other'", "must be the directory's: 'm-tokenizer'")],
    ),
    "unknown model": (
        "m",
        lambda c: setattr(step(c, 2), "model_name", "m-detok"),
        [("m/config.pbtxt step 2 (m-detok): has no readable model", "correct the name")],
    ),
    "unknown model in the middle": (
        "m",
        lambda c: setattr(step(c, 1), "model_name", "nobody"),
        [("m/config.pbtxt step 1 (nobody): has no readable model", "correct the name")],
    ),
    "input_map key": (
        "m",
        lambda c: put(step(c, 0).input_map, "prompt", "text_input"),
        [
            (
                "m/config.pbtxt step 0 (m-tokenizer): input_map key 'prompt'",
                "one of ['enable_thinking', 'messages', 'separate_reasoning', 'text_input']",
            )
        ],
    ),
    "output_map key": (
        "m",
        both(
            lambda c: put(step(c, 2).output_map, "text_output", None),
            lambda c: put(step(c, 2).output_map, "t", "text_output"),
        ),
        [("m/config.pbtxt step 2 (m-detokenizer): output_map key 't'", "'top_log_probs']")],
    ),
    "required input": (
        "m",
        lambda c: put(step(c, 2).input_map, "progress", None),
        [
            (
                "m/config.pbtxt step 2 (m-detokenizer): input 'progress' of the model is required",
                "input_map",
            )
        ],
    ),
    "nobody produces": (
        "m",
        lambda c: put(step(c, 1).input_map, "input_ids", "ids"),
        [
            (
                "m/config.pbtxt step 1 (m-engine): input 'input_ids' takes 'ids', which no step produces",
                "input_map",
            )
        ],
    ),
    "order": (
        "m",
        swap_steps,
        [
            (
                "m/config.pbtxt step 0 (m-engine): input 'input_ids' takes '_input_ids', which only",
                "cycles",
            ),
            (
                "m/config.pbtxt step 0 (m-engine): input 'prompt_info' takes '_prompt_info', which only",
                "cycles",
            ),
        ],
    ),
    "cycle": (
        "m",
        lambda c: put(step(c, 1).input_map, "input_ids", "_output_ids"),
        [
            (
                "m/config.pbtxt step 1 (m-engine): input 'input_ids' takes '_output_ids', which only a later",
                "cycles",
            )
        ],
    ),
    "dtype": (
        "m-detokenizer",
        lambda c: setattr(tensor(c.input, "output_ids"), "data_type", 9),  # TYPE_INT64
        [
            (
                "m/config.pbtxt step 2 (m-detokenizer): input 'output_ids' has data_type TYPE_INT64",
                "make them equal",
            )
        ],
    ),
    "dims": (
        "m-engine",
        lambda c: tensor(c.output, "progress").dims.append(2),
        [
            (
                "m/config.pbtxt step 2 (m-detokenizer): input 'progress' has dims [-1, 1] in",
                "make them equal",
            )
        ],
    ),
    "dtype of an ensemble input": (
        "m",
        lambda c: setattr(tensor(c.input, "seed"), "data_type", 8),  # TYPE_INT32
        [("m/config.pbtxt step 1 (m-engine): input 'seed' has data_type TYPE_UINT64 in m-engine", "equal")],
    ),
    "dtype of an ensemble output": (
        "m",
        lambda c: setattr(tensor(c.output, "num_input_tokens"), "data_type", 9),
        [("m/config.pbtxt: output 'num_input_tokens' has data_type TYPE_INT64 in m and TYPE_INT32", "equal")],
    ),
    "output nobody produces": (
        "m",
        lambda c: put(step(c, 2).output_map, "finish_reason", None),
        [("m/config.pbtxt: output 'finish_reason' is produced by no step", "map a step's output to it")],
    ),
    "input nobody uses": (
        "m",
        lambda c: put(step(c, 1).input_map, "top_k", None),
        [("m/config.pbtxt: input 'top_k' is used by no step", "remove it")],
    ),
    "optional to required": (
        "m-engine",
        lambda c: setattr(tensor(c.input, "seed"), "optional", False),
        [("m/config.pbtxt step 1 (m-engine): input 'seed' is required, but ensemble input", "or neither")],
    ),
    "two producers": (
        "m",
        lambda c: put(step(c, 2).output_map, "text_output", "_input_ids"),
        [
            ("m/config.pbtxt step 2 (m-detokenizer): output 'text_output' is mapped to '_input_ids'", "own"),
            ("m/config.pbtxt: output 'text_output' is produced by no step", "map a step's output to it"),
        ],
    ),
    "around the decoupled step, from a step": (
        "m",
        lambda c: put(step(c, 2).input_map, "output_ids", "_input_ids"),
        [
            (
                "m/config.pbtxt step 2 (m-detokenizer): takes ['_input_ids'] besides what decoupled",
                "last of them",
            )
        ],
    ),
    "max_batch_size of a step": (
        "m-engine",
        lambda c: setattr(c, "max_batch_size", 8),
        [("m/config.pbtxt step 1 (m-engine): the ensemble's max_batch_size is 64", "the model's, 8")],
    ),
    "no steps": (
        "m",
        lambda c: (c.ensemble_scheduling.ClearField("step"), c.ClearField("input"), c.ClearField("output")),
        [("m/config.pbtxt: ensemble_scheduling.step is empty", "at least one step")],
    ),
    "unknown engine parameter": (
        "m-engine",
        lambda c: setattr(c.parameters["slots"], "string_value", "8"),
        [("m-engine/config.pbtxt: parameters: unknown engine parameter 'slots'", "'timeout_ms']")],
    ),
    "max_num_batched_tokens": (
        "m-engine",
        lambda c: setattr(c.parameters["max_num_batched_tokens"], "string_value", "129"),
        [("m-engine/config.pbtxt: parameters: max_num_batched_tokens is 129", "max_seq_len 128")],
    ),
    "a setting of another target": (
        "m-engine",
        lambda c: setattr(c.parameters["batch_invariant"], "string_value", "true"),
        [("m-engine/config.pbtxt: parameters: batch_invariant is true, which target onnx doesn't have", "target cuda")],
    ),
    "engine not decoupled": (
        "m-engine",
        lambda c: c.ClearField("model_transaction_policy"),
        [("m-engine/config.pbtxt: model_transaction_policy.decoupled is false", "set it to true")],
    ),
}


@pytest.mark.parametrize("label", EDITS)
def test_finds_what_is_wrong_in_a_configuration(repository: Path, label: str) -> None:
    model, change, expected = EDITS[label]
    edit(repository, model, change)
    found = problems(repository)
    assert len(found) == len(expected), found
    for problem, (start, end) in zip(sorted(found), sorted(expected), strict=True):
        assert problem.startswith(start) and problem.endswith(end), problem


def test_an_ensemble_input_around_the_decoupled_step(repository: Path) -> None:
    """Triton refuses this at load just as it refuses an earlier step's output."""

    def add_input(config: pbtxt.ModelConfig) -> None:
        config.input.add(name="seed", data_type=5, dims=[1], optional=True)

    edit(repository, "m-detokenizer", add_input)
    edit(repository, "m", lambda c: put(step(c, 2).input_map, "seed", "seed"))
    (found,) = problems(repository)
    assert found.startswith("m/config.pbtxt step 2 (m-detokenizer): takes ['seed'] besides what decoupled ['m-engine']")


def test_batch_dimension_is_part_of_the_shape(repository: Path) -> None:
    """dims [1] of a model without batching is not dims [1] of one with it."""
    no_batches: list[Edit] = [
        lambda c: setattr(c, "max_batch_size", 0),
        lambda c: c.ClearField("dynamic_batching"),
    ]
    edit(repository, "m-tokenizer", both(*no_batches))
    found = problems(repository)
    assert any("input 'text_input' has dims [1] in m-tokenizer and [-1, 1] in m" in line for line in found)
    assert any("the ensemble's max_batch_size is 64, must be at most the model's, 0" in line for line in found)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config.pbtxt": (
        lambda r: (r / "extra").mkdir(),
        "extra/config.pbtxt: is missing; build the model again, or move the directory elsewhere",
    ),
    "unreadable config.pbtxt": (
        lambda r: (r / "m-engine" / "config.pbtxt").write_bytes(b"\xff"),
        "m-engine/config.pbtxt: is unreadable: ",
    ),
    "config.pbtxt that is none": (
        lambda r: (r / "m-engine" / "config.pbtxt").write_text("name m"),
        "m-engine/config.pbtxt: 1:6: ",
    ),
    "no version": (
        lambda r: (r / "m" / "1").rename(r / "m" / "one"),
        "m: has no version that is served; needs a directory named 1",
    ),
    "leading zero": (
        lambda r: (r / "m" / "1").rename(r / "m" / "01"),
        "m: has no version that is served; needs a directory named 1",
    ),
    "no model.py": (
        lambda r: (r / "m-tokenizer" / "1" / "model.py").unlink(),
        "m-tokenizer/1/model.py: is missing, and the Python backend loads it; build the model again",
    ),
    "no model.py in the latest": (
        lambda r: (r / "m-tokenizer" / "10").mkdir(),
        "m-tokenizer/10/model.py: is missing, and the Python backend loads it; build the model again",
    ),
    "no manifest": (
        lambda r: (r / "m-engine" / "1" / "manifest.json").unlink(),
        "m-engine/1/manifest.json: No such file",
    ),
    "no artefact": (
        lambda r: (r / "m-engine" / "1" / "model.onnx").unlink(),
        "m-engine/1/model.onnx: is missing; rebuild with: deepseek-triton build c",
    ),
    "artefact cut short": (
        lambda r: (r / "m-engine" / "1" / "model.onnx").write_bytes(b"gra"),
        "m-engine/1/model.onnx: has 3 bytes, the manifest says 5; rebuild with: deepseek-triton build c",
    ),
}


@pytest.mark.parametrize("label", FILES)
def test_finds_what_is_wrong_with_the_files(repository: Path, label: str) -> None:
    change, expected = FILES[label]
    change(repository)
    found = problems(repository)
    assert any(problem.startswith(expected) for problem in found), found


def test_only_served_versions_count(repository: Path) -> None:
    write_engine(repository / "m-engine" / "2")
    (repository / "m-engine" / "1" / "model.onnx").unlink()
    assert problems(repository) == []
    edit(repository, "m-engine", lambda c: c.version_policy.all.SetInParent())
    assert [line.split(": ")[0] for line in problems(repository)] == ["m-engine/1/model.onnx"]
    edit(repository, "m-engine", lambda c: c.version_policy.specific.versions.append(2))
    assert problems(repository) == []
    edit(repository, "m-engine", lambda c: c.version_policy.specific.versions.__setitem__(0, 3))
    assert problems(repository) == ["m-engine: has no version that is served; needs a directory named 1"]


def test_everything_is_reported_and_raised_together(repository: Path) -> None:
    (repository / "m-tokenizer" / "1" / "model.py").unlink()
    (repository / "m-engine" / "1" / "model.onnx").unlink()
    with pytest.raises(CheckError) as caught:
        require_sound(repository)
    assert len(caught.value.problems) == 2
    assert len(str(caught.value).splitlines()) == 2
    assert len(check_engine_files(repository / "m-engine" / "1")) == 1


def test_no_repository_and_an_empty_one(tmp_path: Path) -> None:
    assert problems(tmp_path / "none")[0].endswith("none: is not a directory; build the model first")
    (tmp_path / ".staging").mkdir()
    (tmp_path / "README.md").touch()
    assert problems(tmp_path)[0].endswith("holds no built models; build one first")


def test_a_folder_that_is_no_repository_is_told_from_one(repository: Path) -> None:
    assert problems(repository / "m") == [
        f"{repository / 'm'}: is one model; give the repository that it lies in, {repository}"
    ]
    (repository.parent / "other" / "docs").mkdir(parents=True)
    (repository.parent / "other" / "docs" / "page.md").touch()
    (line,) = problems(repository.parent / "other")
    assert "other: is no model repository: none of its folders has a config.pbtxt; build a model" in line


def test_configurations_without_a_model_are_named(repository: Path) -> None:
    (repository / "demo").mkdir()
    shutil.copyfile(repository / "m" / "config.pbtxt", repository / "demo" / "config.pbtxt")
    assert problems(repository) == []
    assert unbuilt_models(repository) == ["demo"]
