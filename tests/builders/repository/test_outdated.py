"""A repository that an earlier version built is refused with one line that has the command which rebuilds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.manifest import ManifestError, current_command
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from tests.support.checkpoints import make_checkpoint, make_tokenizer

OLD_MODEL_PY = '''"""What Triton loads; the rest comes with the installed package."""

from ensemble.models.{} import TritonPythonModel as TritonPythonModel
'''
OLD_COMMAND = "deepseek-triton build 'a c' --name m --target onnx --precision fp32 --num-slots 2 --prefill-chunk 16"
COMMAND = (
    "deepseek-triton build 'a c' --name m --target onnx --precision fp32 --max-num-seqs 2 --max-num-batched-tokens 16"
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A repository as the first format had it: manifest, settings' names and imports."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    make_tokenizer(checkpoint)
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 16}
    models = tmp_path / "models"
    build(BuildOptions(checkpoint, "m", models, max_seq_len=32, settings=settings))
    write_old_adapters(models)
    engine = models / "m-engine"
    manifest = json.loads((engine / "1" / "manifest.json").read_text())
    (engine / "1" / "manifest.json").write_text(json.dumps({**manifest, "format": 1, "command": OLD_COMMAND}))
    config = (engine / "config.pbtxt").read_text()
    config = config.replace("max_num_seqs", "num_slots").replace("max_num_batched_tokens", "prefill_chunk")
    (engine / "config.pbtxt").write_text(config)
    return models


def write_old_adapters(models: Path) -> None:
    for part in ("tokenizer", "engine", "detokenizer"):
        (models / f"m-{part}" / "1" / "model.py").write_text(OLD_MODEL_PY.format(part))


@pytest.mark.slow
def test_check_and_serve_refuse_it_with_one_line(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{old}/m-engine/1/manifest.json: has format 1, this version reads 2; rebuild with: {COMMAND}"
    (problem,) = check_repository(old)
    assert str(problem) == line
    assert cli.main(["check", str(old)]) == 1
    assert capsys.readouterr().err.strip() == line
    assert cli.main(["serve", str(old), "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]) == 1
    assert capsys.readouterr().err.strip() == f"error: {line}"


def test_the_engine_refuses_it_at_load(old: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        load_runner(old / "m-engine" / "1", EngineSettings())
    assert str(caught.value).endswith(f"has format 1, this version reads 2; rebuild with: {COMMAND}")
    assert "\n" not in str(caught.value)


def test_a_current_manifest_with_old_adapters_is_refused_too(old: Path) -> None:
    path = old / "m-engine" / "1" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    (problem,) = check_repository(old)
    assert str(problem) == (f"{old}/m-tokenizer/1/model.py: was written by an earlier version; rebuild with: {COMMAND}")


def test_other_models_are_checked_all_the_same(old: Path) -> None:
    (old / "other").mkdir()
    (old / "other" / "1").mkdir()
    assert len(check_repository(old)) == 2


def test_a_manifest_of_another_format_need_not_have_a_command(old: Path) -> None:
    (old / "m-engine" / "1" / "manifest.json").write_text('{"format": 3}')
    (problem,) = check_repository(old)
    assert str(problem).endswith("has format 3, this version reads 2; build it again")


def test_a_command_keeps_all_but_renamed_options() -> None:
    assert current_command(OLD_COMMAND) == COMMAND
    assert current_command(COMMAND) == COMMAND
    assert current_command("an 'open quote") == "an 'open quote"
