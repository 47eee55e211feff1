from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError
from deepseek_triton.builders.graph.builder import GraphBuilder
from deepseek_triton.builders.repository import build as repository
from deepseek_triton.builders.repository import pbtxt
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository, sound_models
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets import target_named
from deepseek_triton.builders.targets.onnx import MAX_TOKENS
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.processes.stat import stat_fields
from deepseek_triton.ensemble.protocol.pipelines import GENERATE_PIPELINE
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.text.chat import end_workers
from tests.support.checkpoints import TINY, make_checkpoint, make_tokenizer, write_tiny

CHOSEN: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "num_threads": 1}
SETTINGS = EngineSettings(**CHOSEN)
MAX_SEQ_LEN = 32
PARTS = ("m", "m-tokenizer", "m-engine", "m-detokenizer")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tokenizer(write_tiny(tmp_path / "tiny", vocab_size=320, eos_token_id=319))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Where the repository is built; nothing else lies beside it but the checkpoint."""
    return tmp_path / "work" / "models"


def options(checkpoint: Path, models: Path, **more: Any) -> BuildOptions:
    return BuildOptions(checkpoint, "m", models, **{"max_seq_len": MAX_SEQ_LEN, "settings": CHOSEN, **more})


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Every path below `directory`, hidden ones included, and each file's bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


@pytest.mark.slow
def test_a_build_gives_a_repository_that_loads_and_answers(tmp_path: Path, models: Path) -> None:
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "llama"))
    reports: list[tuple[str, int, int]] = []
    assert build(options(checkpoint, models), lambda *report: reports.append(report)) == 1
    assert check_repository(models) == []
    assert set(snapshot(models)) == {
        "m", "m/1", "m/config.pbtxt",
        "m-tokenizer", "m-tokenizer/config.pbtxt", "m-tokenizer/1", "m-tokenizer/1/model.py",
        "m-tokenizer/1/tokenizer.json", "m-tokenizer/1/tokenizer_config.json",
        "m-detokenizer", "m-detokenizer/config.pbtxt", "m-detokenizer/1", "m-detokenizer/1/model.py",
        "m-detokenizer/1/tokenizer.json", "m-detokenizer/1/tokenizer_config.json",
        "m-engine", "m-engine/config.pbtxt", "m-engine/1", "m-engine/1/model.py", "m-engine/1/manifest.json",
        "m-engine/1/model.onnx", "m-engine/1/model.onnx.data",
        "m-engine/1/tokenizer.json", "m-engine/1/tokenizer_config.json",
    }  # fmt: skip
    assert [path.name for path in models.parent.iterdir()] == ["models"], "no staging directory is left"

    with pytest.raises(RunnerError, match="batch_invariant is true, which target onnx doesn't have"):
        load_runner(models / "m-engine" / "1", replace(SETTINGS, batch_invariant=True))
    manifest, runner = load_runner(models / "m-engine" / "1", SETTINGS)
    assert (manifest.max_seq_len, manifest.end_ids, manifest.precision) == (MAX_SEQ_LEN, (319,), "fp32")
    assert np.isfinite(runner.prefill(0, np.arange(5), 0)).all()
    runner.close()

    _, done, total = reports[-1]
    assert done == total > 0
    assert [done for _, done, _ in reports] == sorted({done for _, done, _ in reports})


@pytest.mark.slow
def test_the_model_that_answers_infer_is_built_where_it_is_asked_for(checkpoint: Path, models: Path) -> None:
    assert build(options(checkpoint, models, infer=True)) == 1 and check_repository(models) == []
    assert (models / "m-infer" / "1" / "model.py").is_file() and set(sound_models(models)[0]) == {*PARTS, "m-infer"}
    command = Manifest.load(models / "m-engine" / "1").command
    assert "--infer" in command.split()
    assert build(options(checkpoint, models)) == 2
    assert not (models / "m-infer" / "2").exists() and check_repository(models) == []
    with pytest.raises(BuildError, match="--infer is for task generate"):
        options(checkpoint, models, infer=True, task="score", settings={})


@pytest.mark.slow
def test_the_manifest_says_what_was_built_from_what(checkpoint: Path, models: Path) -> None:
    build(options(checkpoint, models, precision="fp16"))
    manifest = Manifest.load(models / "m-engine" / "1")
    assert (manifest.name, manifest.target, manifest.precision, manifest.checkpoint) == ("m", "onnx", "fp16", "tiny")
    assert manifest.spec["hidden_size"] == TINY["hidden_size"]
    assert manifest.shapes["logits"] == ["batch", 320]
    assert manifest.shapes["past_key_0"] == ["batch", 1, MAX_SEQ_LEN, 4]
    assert manifest.versions.keys() >= {"onnx", "onnxruntime", "numpy"}
    assert manifest.command == (
        f"deepseek-triton build {checkpoint} --name m --target onnx --precision fp16 --repository {models} "
        f"--max-seq-len {MAX_SEQ_LEN} --max-num-seqs 2 --max-num-batched-tokens 8 --num-threads 1"
    )
    graph = onnx.load(models / "m-engine" / "1" / "model.onnx", load_external_data=False)
    assert graph.producer_name == "deepseek-triton" and "input_ids" in graph.doc_string


@pytest.mark.slow
def test_the_rebuild_command_builds_the_same_again(checkpoint: Path, models: Path) -> None:
    import shlex

    from deepseek_triton.builders.cli import main

    build(options(checkpoint, models))
    before = snapshot(models / "m-engine" / "1")
    command = Manifest.load(models / "m-engine" / "1").command
    assert main(shlex.split(command)[1:]) == 0
    assert snapshot(models / "m-engine" / "2") == before


@pytest.mark.slow
def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "c", "qwen2-tied-yarn"))
    for name in ("one", "two"):
        build(options(checkpoint, tmp_path / name / "models"))
    one, two = (snapshot(tmp_path / name / "models") for name in ("one", "two"))
    # The manifest's rebuild command names the repository, which differs.
    assert {path for path in one if one[path] != two[path]} == {"m-engine/1/manifest.json"}
    assert one.keys() == two.keys()


@pytest.mark.slow
def test_another_checkpoint_has_another_hash(checkpoint: Path, models: Path) -> None:
    build(options(checkpoint, models))
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = np.float32(0.125).tobytes()
    file.write_bytes(content)
    build(options(checkpoint, models))
    first, second = (Manifest.load(models / "m-engine" / version) for version in ("1", "2"))
    assert first.checkpoint_sha256 != second.checkpoint_sha256
    assert first.files["model.onnx"] == second.files["model.onnx"]
    assert first.files["model.onnx.data"] != second.files["model.onnx.data"]


@pytest.mark.slow
def test_a_build_leaves_no_process_behind(checkpoint: Path, models: Path) -> None:
    end_workers()  # of earlier tests
    before = children()
    build(options(checkpoint, models))  # which ends nothing here (tests/conftest.py)
    assert len(children() - before) == 1, "the process that rendered the chat template"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(repository, "end_workers", end_workers)
        build(options(checkpoint, models))
    assert children() == before


def children() -> set[int]:
    """This process's own children."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            if int(stat_fields(process.name)[1]) == os.getpid():
                found.add(int(process.name))
    return found


@pytest.mark.slow
def test_the_next_build_is_version_2_beside_an_untouched_version_1(checkpoint: Path, models: Path) -> None:
    build(options(checkpoint, models))
    first = {path: data for path, data in snapshot(models).items() if "/1" in path}
    more = {"max_num_seqs": 3, "max_num_batched_tokens": 8}
    assert build(options(checkpoint, models, settings=more)) == 2
    after = snapshot(models)
    assert {path: data for path, data in after.items() if "/1" in path} == first
    assert {path for path in after if path.endswith("/2")} == {f"{part}/2" for part in PARTS}
    assert b'"max_num_seqs"' in (after["m-engine/config.pbtxt"] or b"").replace(b" ", b"")
    assert "3" in pbtxt.parse_text(
        (models / "m-engine" / "config.pbtxt").read_text(), models
    ).parameters["max_num_seqs"].string_value  # fmt: skip
    assert check_repository(models) == []
    assert build(BuildOptions(checkpoint, "other", models, max_seq_len=64)) == 1
    assert check_repository(models) == []


@pytest.mark.slow
def test_the_version_is_one_more_than_any_part_has(checkpoint: Path, models: Path) -> None:
    build(options(checkpoint, models))
    (models / "m-tokenizer" / "7").mkdir()
    assert build(options(checkpoint, models)) == 8
    assert {path.name for path in (models / "m").iterdir() if path.is_dir()} == {"1", "8"}


# What goes wrong leaves the repository as it was


Break = Callable[[pytest.MonkeyPatch, Path], object]


def _raise(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*arguments: Any, **options: Any) -> NoReturn:
        raise error

    return fail


def _nth(number: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but its call `number` (from 1) fails."""
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return function(*arguments, **options)

    return counted


def mis_shape(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 13}))


def not_finite(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    file.write_bytes(content)


def shrink(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    def opened(path: Path, adapter: Path | None) -> Any:
        source = real(path)
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        return source

    real = open_checkpoint
    monkeypatch.setattr(repository, "open_checkpoint", opened)


def full_disk(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(GraphBuilder, "weight", _nth(9, error, GraphBuilder.weight))


def interrupt_in_weights(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(GraphBuilder, "weight", _nth(9, KeyboardInterrupt(), GraphBuilder.weight))


def interrupt_in_graph(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(onnx, "save", _raise(KeyboardInterrupt()))


def unsound(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr(repository, "_write_adapter", lambda name, directory: None)


def _moving(method: str, number: int, error: BaseException) -> Break:
    return lambda monkeypatch, checkpoint: monkeypatch.setattr(Path, method, _nth(number, error, getattr(Path, method)))


def after_moving(method: str, number: int) -> Break:
    """The interrupt comes just after a move was made, before anything could note it down."""

    def apply(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
        function, calls = getattr(Path, method), 0

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            function(*arguments)
            if calls == number:
                raise KeyboardInterrupt

        monkeypatch.setattr(Path, method, counted)

    return apply


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BREAKS: dict[str, tuple[Break, type[BaseException], str]] = {
    "mis-shaped tensor": (mis_shape, CheckpointError, "has shape [12, 8], expected [13, 8]"),
    "NaN in the last tensor": (not_finite, BuildError, "lm_head.weight"),
    "checkpoint cut short meanwhile": (shrink, CheckpointError, "ends inside lm_head.weight"),
    "disk full while writing weights": (full_disk, BuildError, "No space left on device"),
    "interrupted while writing weights": (interrupt_in_weights, KeyboardInterrupt, ""),
    "interrupted while writing the graph": (interrupt_in_graph, KeyboardInterrupt, ""),
    "unsound": (unsound, BuildError, "model.py: is missing"),
    **{
        f"interrupted before rename {n}": (_moving("rename", n, KeyboardInterrupt()), KeyboardInterrupt, "")
        for n in range(1, 5)
    },
    **{f"interrupted after rename {n}": (after_moving("rename", n), KeyboardInterrupt, "") for n in range(1, 5)},
    **{f"interrupted after replace {n}": (after_moving("replace", n), KeyboardInterrupt, "") for n in range(1, 5)},
    "disk full while moving": (_moving("rename", 3, NO_SPACE), BuildError, "No space left on device"),
    "disk full while replacing": (_moving("replace", 2, NO_SPACE), BuildError, "No space left on device"),
}


@pytest.mark.slow
@pytest.mark.parametrize("has_version_1", [True, False])
@pytest.mark.parametrize("name", BREAKS)
def test_a_build_that_fails_leaves_everything_as_it_was(
    name: str, has_version_1: bool, checkpoint: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, error, message = BREAKS[name]
    work = models.parent
    work.mkdir()
    if has_version_1:
        build(options(checkpoint, models))
    before = snapshot(work)
    with monkeypatch.context() as patched:
        apply(patched, checkpoint)
        with pytest.raises(error) as caught:
            build(options(checkpoint, models, settings={"max_num_seqs": 5, "max_num_batched_tokens": 8}))
    assert message in str(caught.value)
    assert snapshot(work) == before
    if isinstance(caught.value, BuildError):
        assert "-building-" not in str(caught.value) or name == "unsound", "a path that no longer exists"


@pytest.fixture
def sound(checkpoint: Path, models: Path) -> Iterator[tuple[Path, Path]]:
    """The checkpoint, and the directory that a failing build must not change."""
    models.parent.mkdir()
    yield checkpoint, models
    assert snapshot(models.parent) == {}


def message(*arguments: Any, **more: Any) -> str:
    with pytest.raises(BuildError) as caught:
        build(options(*arguments, **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tokenizers_at_fault(sound: tuple[Path, Path]) -> None:
    checkpoint, models = sound
    make_tokenizer(checkpoint, vocab_size=321)
    text = message(checkpoint, models)
    assert "the tokenizer has 321 tokens, the model 320; they don't belong together" in text and str(checkpoint) in text
    (checkpoint / "tokenizer.json").write_text("{}")
    text = message(checkpoint, models)
    assert f"{checkpoint}: tokenizer.json is not a tokenizer" in text and "-building-" not in text
    (checkpoint / "tokenizer.json").unlink()
    assert "tokenizer.json does not exist; convert the tokenizer" in message(checkpoint, models)


@pytest.mark.slow
def test_a_full_disk_is_told_before_anything_large_is_written(
    sound: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 1000))
    monkeypatch.setattr(GraphBuilder, "weight", _raise(AssertionError("written all the same")))
    text = message(*sound)
    assert "MiB needed, 0 MiB free; make room" in text


@pytest.mark.slow
def test_limits_of_the_sequence_length(sound: tuple[Path, Path], tmp_path: Path) -> None:
    text = message(*sound, max_seq_len=65)
    assert "max_seq_len is 65, the model was trained for 64 tokens" in text
    assert "max_num_batched_tokens is 8, must be at most max_seq_len 7" in message(*sound, max_seq_len=7)
    with pytest.raises(BuildError, match="max_seq_len is 1, must be at least 2"):
        options(*sound, max_seq_len=1)

    def built(max_seq_len: int | None, **config: Any) -> int:
        checkpoint = make_tokenizer(write_tiny(tmp_path / "other", vocab_size=320, **config))
        target = tmp_path / "elsewhere" / "models"
        version = build(options(checkpoint, target, max_seq_len=max_seq_len))
        return Manifest.load(target / "m-engine" / str(version)).max_seq_len

    assert built(None) == 64, "the model's own"
    assert built(64) == 64
    assert built(None, max_position_embeddings=100_000) == MAX_TOKENS
    assert built(4096, max_position_embeddings=100_000) == 4096
    assert built(None, rope_scaling={"type": "dynamic", "factor": 3.0}) == 192, "what dynamic scaling adds"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": ""}, "name is ''"),
        ({"name": "a/b"}, "name is 'a/b'; use letters"),
        ({"name": ".."}, "name is '..'"),
        ({"name": "-x"}, "name is '-x'"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"target": "abacus"}, "target is 'abacus'; supported: onnx"),
        ({"precision": "fp7"}, "precision is 'fp7'; supported: fp32, fp16"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BuildError) as caught:
        BuildOptions(**{"checkpoint": Path("c"), "name": "m", **changes})
    assert text in str(caught.value)


@pytest.mark.slow
def test_places_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "models", file / "deeper" / "models"):
        assert str(file) in message(checkpoint, place)
    models = tmp_path / "models"
    models.mkdir()
    (models / "m").write_text("not a model")
    assert "m" in message(checkpoint, models)
    assert snapshot(models) == {"m": b"not a model"}
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(checkpoint: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("closed").mkdir(mode=0o500)
    assert "Permission denied" in message(checkpoint, tmp_path / "closed" / "models")


def test_the_committed_demo_configuration_is_what_the_builders_write() -> None:
    committed = Path(__file__).parents[3] / "model_repository"
    configs = (
        pbtxt.tokenizer_config("smollm2"),
        pbtxt.engine_config("smollm2", target_named("onnx").parameters(EngineSettings())),
        pbtxt.detokenizer_config("smollm2"),
        pbtxt.ensemble_config("smollm2", GENERATE_PIPELINE),
    )
    for config in configs:
        path = committed / config.name / "config.pbtxt"
        assert path.read_text(encoding="utf-8") == pbtxt.to_text(config), f"{path} is out of date: run make demo"


@pytest.mark.parametrize("name", ["m-engine", "m-tokenizer", "m-detokenizer", "m-scorer", "m-infer"])
def test_a_models_name_is_no_parts_name(checkpoint: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=f"name is '{name}'; a model's parts end in"):
        BuildOptions(checkpoint, name, tmp_path / "models")


def test_a_name_has_at_most_so_many_characters(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="name has 129 characters, must have at most 128"):
        BuildOptions(checkpoint, "m" * 129, tmp_path / "models")
