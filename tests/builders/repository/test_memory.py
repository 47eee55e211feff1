"""Settings for which what serves has no memory are refused at the build, with the largest that fits."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.models.memory import check_fits
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions
from deepseek_triton.builders.targets import target_named
from deepseek_triton.builders.targets.artefacts import memory
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.protocol.settings import EngineSettings
from tests.support.tuning import tiny_checkpoint

GIB = 2**30
ENGINE = asdict(EngineSettings())


@pytest.fixture
def seven(tmp_path: Path) -> ModelSpec:
    """A model of the size of R1-Distill-Qwen-7B: 57,344 bytes of cache a token in 16 bits."""
    spec = open_checkpoint(tiny_checkpoint(tmp_path)).spec
    return replace(
        spec, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, intermediate_size=18944, hidden_size=3584,
        vocab_size=152064, max_position_embeddings=131072,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 GiB without a GPU."""
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(memory, "_gpus_here", list)


def most(target: str, precision: str, spec: ModelSpec, named: str | None, **more: Any) -> tuple[int, str]:
    """The largest number of sequences that the error names, and its text; with that number there is no error."""
    settings = {**ENGINE, "max_num_seqs": 10**8, **more}
    arguments = (target_named(target), "generate", spec, precision, 4096)
    with pytest.raises(BuildError) as caught:
        check_fits(*arguments, settings, named)
    text = str(caught.value)
    found = re.search(r"at most ([\d,]+) fit", text)
    assert found is not None, text
    largest = int(found[1].replace(",", ""))
    if largest:
        check_fits(*arguments, {**settings, "max_num_seqs": largest}, named)
    with pytest.raises(BuildError, match="fit"):
        check_fits(*arguments, {**settings, "max_num_seqs": largest + 1}, named)
    return largest, text


@pytest.mark.parametrize(
    ("target", "precision", "named", "what", "lowest", "highest"),
    [
        ("onnx", "fp32", None, "this machine has 64.0 GiB", 60, 90),
        ("onnx", "fp32", "256", "--memory 256 has 256.0 GiB", 480, 520),
        ("cuda", "fp8", "h100", "GPU h100 has 80.0 GiB", 325, 335),
        ("cuda", "bf16", "H100", "GPU H100 has 80.0 GiB", 285, 300),
        ("cuda", "bf16", "NVIDIA L4", "GPU NVIDIA L4 has 24.0 GiB", 40, 48),
        ("cuda", "bf16", None, "the largest GPU, b300, has 288.0 GiB", 1200, 1260),
        ("tensorrt", "fp16", "24", "--memory 24 has 24.0 GiB", 40, 48),
    ],
)
def test_a_hundred_million_sequences_are_refused_everywhere(
    target: str, precision: str, named: str | None, what: str, lowest: int, highest: int, seven: ModelSpec
) -> None:
    largest, text = most(target, precision, seven, named)
    assert what in text and f"--max-num-seqs {largest}" in text and "--memory" in text
    assert lowest <= largest <= highest


def test_the_gpu_here_counts_where_none_is_named(seven: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_gpus_here", lambda: [80 * GIB, 24 * GIB])
    assert "the GPU here has 24.0 GiB" in most("cuda", "bf16", seven, None)[1]


def test_each_gpu_has_its_share_of_a_model_that_is_split(seven: ModelSpec) -> None:
    one, _ = most("cuda", "bf16", seven, "h100")
    four, _ = most("cuda", "bf16", seven, "h100", tensor_parallel_size=4)
    assert four > 4 * one


def test_a_cache_larger_than_the_memory_is_refused_and_the_length_is_named(seven: ModelSpec) -> None:
    settings = {**ENGINE, "max_num_seqs": 64}
    with pytest.raises(
        BuildError, match=r"at most 9 fit; use --max-num-seqs 9 or --max-seq-len (\d+) in a build"
    ) as caught:
        check_fits(target_named("cuda"), "generate", seven, "bf16", 131072, settings, "h100")
    tokens = int(str(caught.value).split("--max-seq-len ")[1].split()[0])
    check_fits(target_named("cuda"), "generate", seven, "bf16", tokens, settings, "h100")


def test_a_step_that_is_larger_than_the_memory_is_refused(seven: ModelSpec) -> None:
    arguments = (target_named("cuda"), "generate", seven, "bf16", 4096)
    settings = {**ENGINE, "max_num_seqs": 64}
    check_fits(*arguments, {**settings, "max_num_batched_tokens": 8192}, "h100")
    # More tokens than all sequences hold are never computed, so a small engine may have any number.
    check_fits(*arguments, {**settings, "max_num_seqs": 1, "max_num_batched_tokens": 10**8}, "h100")
    with pytest.raises(
        BuildError, match=r"max_num_seqs is 64: caches of 4,096 tokens each and steps need .* at most \d+ fit"
    ):
        check_fits(*arguments, {**settings, "max_num_batched_tokens": 10**8}, "24")
    with pytest.raises(
        BuildError, match=r"max_num_batched_tokens is 100,000,000: a step needs .* at most [\d,]+ fit"
    ) as caught:
        check_fits(
            target_named("cuda"), "generate", seven, "bf16", 65536, {**settings, "max_num_batched_tokens": 10**8}, "24"
        )
    fitting = int(str(caught.value).split("--max-num-batched-tokens ")[1].split()[0])
    one = {**settings, "max_num_seqs": 1, "max_num_batched_tokens": fitting}
    check_fits(target_named("cuda"), "generate", seven, "bf16", 65536, one, "24")


def test_where_the_weights_alone_do_not_fit_sane_settings_are_built(seven: ModelSpec) -> None:
    settings = {**ENGINE, "max_num_seqs": 8}
    check_fits(target_named("cuda"), "generate", seven, "bf16", 4096, settings, "8")
    assert most("cuda", "bf16", seven, "8")[0] > 8


@pytest.mark.parametrize("named", ["0", "-1", "nan", "inf", "", "gtx", "1e999"])
def test_what_names_no_memory_is_refused(named: str, tmp_path: Path) -> None:
    for target in ("onnx", "cuda"):
        with pytest.raises(BuildError, match=f"memory is '{named}', must be a number of GiB"):
            BuildOptions(tmp_path, "m", target=target, precision=target_named(target).precisions[0], memory=named)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"settings": {"max_num_seqs": 10**8}}, r"max_num_seqs is 100,000,000, for which .*: at most [\d,]+ have 64"),
        (
            {"settings": {"max_num_seqs": 10**8}, "max_seq_len": 32},
            r"caches of 32 tokens .*: at most [\d,]+ fit; use --max",
        ),
        ({"settings": {"num_threads": 10**8}}, "num_threads is 100000000, must be at most 1024"),
        ({"settings": {"priority_levels": 10**8}}, "priority_levels is 100000000, must be at most 1000"),
        ({"settings": {"max_queue_size": 10**12}}, "max_queue_size is 1000000000000, must be at most 2147483647"),
        ({"settings": {"timeout_ms": 10**12}}, "timeout_ms is 1000000000000, must be at most 2147483647"),
        (
            {"settings": {"max_num_batched_tokens": 10**8}},
            "max_num_batched_tokens is 100000000, must be at most max_seq",
        ),
        ({"instances": {"tokenizer_instances": 10**8}}, "tokenizer_instances is 100000000, must be at most 64"),
    ],
)
def test_absurd_settings_are_refused_before_anything_is_written(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    with pytest.raises(BuildError, match=message):
        build(BuildOptions(checkpoint, "m", tmp_path / "models", **more))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("batching", "message"),
    [
        ({"engine_instances": 10**8}, "engine_instances is 100000000, must be at most 64"),
        ({"max_batch_size": 10**8}, "max_batch_size is 100000000, must be at most 65536"),
        ({"max_queue_delay_us": 10**12}, "max_queue_delay_us is 1000000000000, must be at most 2147483647"),
    ],
)
def test_absurd_batches_are_refused(batching: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        ScoringOptions(batching=Batching(**batching))


def test_copies_of_the_weights_must_fit(seven: ModelSpec) -> None:
    arguments = (target_named("onnx"), "score", seven, "fp32", 2048)
    check_fits(*arguments, {"engine_instances": 2}, None)
    with pytest.raises(
        BuildError, match=r"engine_instances is 3: copies of .* this machine has 64.0 GiB: at most 2 fit"
    ):
        check_fits(*arguments, {"engine_instances": 3}, None)
