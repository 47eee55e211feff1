"""Target vllm: what is written for Triton's vLLM backend, what it needs, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders import cli
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.text.tokenizer import Tokenizer
from tests.support.checkpoints import make_checkpoint
from tests.support.real_tokenizers import smollm2_directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    path = make_checkpoint(tmp_path_factory.mktemp("vllm") / "v3", "v3", vocab_size=49152, num_hidden_layers=4)
    shutil.copytree(smollm2_directory(), path, dirs_exist_ok=True)
    return path


def built(checkpoint: Path, models: Path, lines: list[str] | None = None, **options: Any) -> Path:
    build(
        BuildOptions(checkpoint, "r1", models, target="vllm", precision="stored", **options),
        say=(lines if lines is not None else []).append,
    )
    assert check_repository(models) == []
    return models / "r1-vllm" / "1"


@pytest.mark.slow
def test_arguments_and_needs_of_sixteen_gpus(checkpoint: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    parallel = {"tensor_parallel_size": 4, "pipeline_parallel_size": 4, "expert_parallel": True, "max_num_seqs": 32}
    directory = built(checkpoint, tmp_path / "models", lines, settings=parallel, memory="h100", max_seq_len=48)
    assert json.loads((directory / "model.json").read_text()) == {
        "model": str(checkpoint), "tokenizer": str(directory / "tokenizer"), "max_model_len": 48,
        "max_num_seqs": 32, "max_num_batched_tokens": 8192, "tensor_parallel_size": 4, "pipeline_parallel_size": 4,
        "enable_expert_parallel": True, "gpu_memory_utilization": 0.9, "enable_prefix_caching": True,
        "distributed_executor_backend": "ray", "generation_config": "vllm",
    }  # fmt: skip
    assert any("needs 16 GPUs on 2 machines" in line for line in lines)
    assert any("Ray cluster" in line for line in lines)
    manifest = Manifest.load(tmp_path / "models" / "r1-engine" / "1")
    assert manifest.files == {} and manifest.engine["arguments"]["pipeline_parallel_size"] == 4
    # What vLLM was told can't be changed afterwards; what only the engine uses can.
    assert cli.main(["configure", "r1", "--repository", str(tmp_path / "models"), "--max-num-seqs", "8"]) == 0
    assert cli.main(["configure", "r1", "--repository", str(tmp_path / "models"), "--tensor-parallel-size", "2"]) == 1


@pytest.mark.slow
def test_vllm_s_tokenizer_gives_the_ids_of_the_engine_s(checkpoint: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    directory = built(checkpoint, tmp_path / "models")
    theirs = transformers.AutoTokenizer.from_pretrained(directory / "tokenizer")
    ours = Tokenizer.from_directory(tmp_path / "models" / "r1-engine" / "1")
    chat = ours.encode_messages('[{"role": "user", "content": "un thé  à\\n\\n 5 h"}]')
    for ids in (ours.encode("  two spaces, été, 茶, 🙂\n\n"), chat):
        assert theirs(ours.text_of(ids))["input_ids"] == ids.tolist()
        assert np.array_equal(ours.encode_continuation(ours.text_of(ids)), ids)


@pytest.mark.slow
def test_a_second_build_and_an_unreadable_configuration(checkpoint: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    built(checkpoint, models)
    build(BuildOptions(checkpoint, "r1", models, target="vllm", precision="stored"))
    arguments = json.loads((models / "r1-vllm" / "2" / "model.json").read_text())
    assert arguments["tokenizer"] == str(models / "r1-vllm" / "2" / "tokenizer")
    config = models / "r1-vllm" / "config.pbtxt"
    text = config.read_text()
    assert 'backend: "vllm"' in text and "KIND_MODEL" in text
    config.write_text("broken {")
    assert cli.main(["configure", "r1", "--repository", str(models), "--reset-settings"]) == 0
    assert config.read_text() == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"tensor_parallel_size": 3}}, "tensor_parallel_size is 3, must divide the model's"),
        ({"settings": {"pipeline_parallel_size": 64}}, "pipeline_parallel_size is 64, the model has"),
        ({"settings": {"gpu_memory_share": 1.5}}, "gpu_memory_share is 1.5, must be at most 1"),
        ({"settings": {"num_threads": 2}}, "num_threads is 2, which target vllm doesn't have"),
        ({"infer": False, "task": "score"}, "which task score doesn't have"),
    ],
)
def test_what_it_refuses(checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        built(checkpoint, tmp_path / "models", **options)
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
def test_too_few_gpus_are_told_how_many_would_do(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R1's 641 GiB of files on one H100."""
    from deepseek_triton.builders.targets.artefacts import vllm_model

    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        os.truncate(file.fileno(), 641 * 2**30)  # a hole: it takes no disk
    monkeypatch.setattr(vllm_model, "shard_files", lambda path: [huge])
    monkeypatch.setattr(vllm_model, "GPUS_PER_MACHINE", 4)
    with pytest.raises(BuildError, match="16 would do: --tensor-parallel-size 4 --pipeline-parallel-size 4"):
        built(checkpoint, tmp_path / "models", memory="h100")


def test_a_dense_model_has_no_experts_to_share_out(tmp_path: Path) -> None:
    from tests.support.checkpoints import make_tokenizer

    path = make_checkpoint(tmp_path / "checkpoint", "llama")
    make_tokenizer(path)
    with pytest.raises(BuildError, match="expert_parallel is for a model with experts"):
        built(path, tmp_path / "models", settings={"expert_parallel": True})
