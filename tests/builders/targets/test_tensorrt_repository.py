"""`build` for TensorRT, end to end: a repository whose engine is a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions
from deepseek_triton.builders.tensorrt import build as engine_build
from deepseek_triton.builders.tensorrt.compile import Compiled, CompileJob, compile_graph
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.artefacts.tensorrt_api import DISTRIBUTIONS
from deepseek_triton.ensemble.engine.runners.base import RunnerError
from deepseek_triton.ensemble.engine.runners.load import load_runner
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from deepseek_triton.ensemble.scoring.profile import ScoringProfile
from tests.support.checkpoints import make_checkpoint, make_tokenizer

pytest.importorskip("tensorrt_rtx", reason="pip install 'tensorrt-rtx>=1.7'", exc_type=ImportError)


@pytest.mark.slow
def test_build_makes_a_repository_of_a_plan_and_of_a_scoring_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "qwen2")
    make_tokenizer(checkpoint)
    options = BuildOptions(
        checkpoint, "tiny", tmp_path / "models",
        target="tensorrt-rtx", precision="fp16", max_seq_len=64, compute_capability="8.9",
        settings={"max_num_seqs": 2, "max_num_batched_tokens": 16}, builder_optimization_level=1,
    )  # fmt: skip
    said: list[str] = []
    levels: list[int | None] = []

    def compiled(job: CompileJob) -> Compiled:
        levels.append(job.optimization_level)
        return compile_graph(job)

    monkeypatch.setattr(engine_build, "compile_graph", compiled)
    build(options, say=said.append)
    assert levels == [1]
    assert any(line.startswith("compiling for tensorrt-rtx will take some ") for line in said)
    directory = options.repository / "tiny-engine" / "1"
    manifest = Manifest.load(directory)
    manifest.verify(directory)
    assert {path.name for path in directory.iterdir()} == {
        "manifest.json", "model.plan", "model.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert manifest.engine["attention"] in ("lengths", "mask") and manifest.engine["compute_capability"] == "8.9"
    with pytest.raises(RunnerError, match=r"CUDA|cuda"):  # no GPU here
        load_runner(directory, EngineSettings(**options.settings))

    # Datacenter TensorRT can't be had without its container: its API is TensorRT for RTX's.
    monkeypatch.setitem(DISTRIBUTIONS, "tensorrt", DISTRIBUTIONS["tensorrt-rtx"])
    batching = Batching(max_batch_size=2)
    scoring = ScoringOptions(batching=batching)
    scorer = replace(options, name="scorer", target="tensorrt", task="score", scoring=scoring, settings={})
    build(scorer)
    assert check_repository(options.repository) == []
    engine = options.repository / "scorer-engine"
    assert {path.name for path in (engine / "1").iterdir()} == {"manifest.json", "model.plan"}
    profile = ScoringProfile.load(options.repository / "scorer-tokenizer" / "1")
    assert profile.max_request_tokens == 64, "a plan pads a row to its whole request"
    config = engine / "config.pbtxt"
    text = config.read_text()
    assert 'platform: "tensorrt_plan"' in text and "dynamic_batching" in text
    config.write_text(text.replace("max_batch_size: 2", "max_batch_size: 3"))
    (problem,) = check_repository(options.repository)
    assert "max_batch_size is 3, the plan was built for 2" in str(problem)
