"""Targets are found by name: a new one is a module that builds and a module that loads, and no other file."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders import cli, targets
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets.artefacts import onnx_runtime
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.engine import runners
from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.load import load_runner, load_scoring_runner
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.scoring.settings import ScoringSettings
from tests.support.checkpoints import make_checkpoint, make_tokenizer

ROOT = Path(__file__).parents[3]
BUILDER = """
from deepseek_triton.builders.targets.artefacts.target import Artefacts, CacheBudget, Target

class AbacusTarget(Target):
    name = "toy-abacus"
    precisions = ("fp32",)

    def cache_budget(self):
        return CacheBudget(2**30, 1, "the frame")

    def default_settings(self, options, spec, max_seq_len):
        return {**super().default_settings(options, spec, max_seq_len), "max_num_seqs": 3}

    def write(self, job, settings):
        path = job.directory / "beads.txt"
        path.write_text(f"{job.spec.num_layers} rows for {settings.max_num_seqs}")
        return Artefacts((path,), engine={"wood": "beech"})

    def check(self, manifest, settings):
        if settings.max_num_seqs > 9:
            yield "max_num_seqs is above 9, an abacus has nine rows"
        yield from super().check(manifest, settings)

TARGET = AbacusTarget()
"""
RUNNER = """
class AbacusRunner:
    def __init__(self, beads, max_num_seqs):
        self.beads, self.max_num_seqs = beads, max_num_seqs

def load(directory, manifest, settings):
    return AbacusRunner((directory / "beads.txt").read_text(), settings.max_num_seqs)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A target that exists only as two new files, as if they lay in the packages."""
    for package, text in ((targets, BUILDER), (runners, RUNNER)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "toy_abacus.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()
    targets._load.cache_clear()
    yield "toy-abacus"
    targets._load.cache_clear()
    for package in (targets, runners):
        sys.modules.pop(f"{package.__name__}.toy_abacus", None)
        if hasattr(package, "toy_abacus"):
            del package.toy_abacus


def test_the_targets_are_those_of_the_package() -> None:
    assert targets.target_names() == ("onnx", "cuda", "tensorrt", "tensorrt-rtx", "vllm")
    assert [target.name for target in targets.all_targets()] == list(targets.target_names())
    with pytest.raises(BuildError, match="target is 'artefacts'; supported: onnx, cuda, tensorrt, tensorrt-rtx, vllm"):
        targets.target_named("artefacts")


@pytest.mark.slow
def test_a_new_target_is_two_files(toy: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    make_tokenizer(checkpoint)
    models = tmp_path / "models"
    arguments = ["build", str(checkpoint), "--name", "m", "--repository", str(models), "--target", toy]
    assert cli.main([*arguments, "--max-seq-len", "32"]) == 0
    directory = models / "m-engine" / "1"
    manifest = Manifest.load(directory)
    assert (manifest.target, manifest.precision, manifest.engine) == (toy, "fp32", {"wood": "beech"})
    assert check_repository(models) == []
    config = models / "m-engine" / "config.pbtxt"
    assert config.read_text().count('string_value: "3"') == 2, "its own default of max_num_seqs, and priority_levels"
    loaded: Any
    _, loaded = load_runner(directory, EngineSettings(max_num_seqs=2, max_num_batched_tokens=8))
    assert (loaded.beads, loaded.max_num_seqs) == ("3 rows for 3", 2)
    with pytest.raises(RunnerError, match="Triton's own backend runs it"):
        load_scoring_runner(directory, ScoringSettings())
    config.write_text(config.read_text().replace('string_value: "3"', 'string_value: "10"'))
    (problem,) = check_repository(models)
    assert "parameters: max_num_seqs is above 9" in str(problem)
    with pytest.raises(BuildError, match="target toy-abacus has fp32"):
        BuildOptions(checkpoint, "m", target=toy, precision="fp8")
    with pytest.raises(BuildError, match="timing_cache is for TensorRT, the target is toy-abacus"):
        BuildOptions(checkpoint, "m", target=toy, timing_cache=tmp_path)
    with pytest.raises(BuildError, match=r"which task score doesn't have.*use target onnx or cuda or tensorrt$"):
        BuildOptions(checkpoint, "m", target=toy, task="score")
    with pytest.raises(BuildError, match="batch_invariant is true, which target toy-abacus doesn't have"):
        BuildOptions(checkpoint, "m", target=toy, settings={"batch_invariant": True})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["abacus", "load", "base", "../onnx", "", "onnx.x"])
def test_artefacts_of_an_unknown_target_are_refused(name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "llama")
    make_tokenizer(checkpoint)
    build(BuildOptions(checkpoint, "m", tmp_path / "models", max_seq_len=16))
    directory = tmp_path / "models" / "m-engine" / "1"
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"target": "onnx"', f'"target": "{name}"'))
    with pytest.raises(RunnerError, match="which this version has no runner for"):
        load_runner(directory, EngineSettings(max_num_batched_tokens=16))
    (problem,) = check_repository(tmp_path / "models")
    assert f"target is '{name}'; supported: onnx" in str(problem) and "rebuild with: deepseek-triton" in str(problem)


def test_no_targets_name_is_compared_elsewhere() -> None:
    compared = re.compile(
        r"""(?:target|\.name)\b[^\n]*(?:==|!=|\bin\b|startswith)\s*\(?["'](?:onnx|cuda|tensorrt|tensorrt-rtx)["']"""
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("builders", "ensemble", "clients", "loadtest")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if compared.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("installed", ["1.24.4", "1.29.0"])
def test_fp8_for_a_cpu_needs_an_onnx_runtime_that_runs_it(
    installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_runtime, "package_version", lambda name: installed)
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "qwen2"))
    options = BuildOptions(checkpoint, "m", tmp_path / "models", target="onnx", precision="fp8", recipe="fast")
    with pytest.raises(BuildError, match=rf"onnxruntime {installed} can't run FP8; pip install 'onnxruntime>=1.25,!=1"):
        build(options)
    assert not (tmp_path / "models" / "m-engine").exists()
    assert onnx_runtime.required_packages(24, "fp32") == {"onnxruntime": "1.24"}
    assert onnx_runtime.required_packages(23, "fp8") == {"onnxruntime": "1.25"}
