from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.repository.sequence_len import SequenceLen, choose_max_seq_len
from deepseek_triton.builders.targets import onnx
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from tests.support.checkpoints import make_checkpoint

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """The caches of R1-Distill-Qwen-7B: 28 layers of 4 key heads of 128, 57,344 bytes a token in float16."""
    spec = open_checkpoint(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2")).spec
    return replace(
        spec, num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, intermediate_size=18944,
        max_position_embeddings=131_072,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "host_memory_bytes", lambda: 16 * GIB)


def chosen(model: ModelSpec, target: str, precision: str = "fp16", **options: Any) -> SequenceLen:
    return choose_max_seq_len(BuildOptions(Path("c"), "m", target=target, precision=precision, **options), model)


def test_what_is_asked_for_is_what_is_built(model: ModelSpec) -> None:
    assert chosen(model, "onnx", max_seq_len=131_072).tokens == 131_072
    with pytest.raises(BuildError, match="max_seq_len is 131073, the model was trained for 131072 tokens"):
        chosen(model, "onnx", max_seq_len=131_073)


@pytest.mark.parametrize(
    ("target", "precision", "settings", "tokens"),
    [
        ("cuda", "bf16", {"kv_cache": "slots"}, 32_768),  # 32 GiB / 16 sequences / 57,344 bytes = 37,449
        ("cuda", "bf16", {"kv_cache": "slots", "tensor_parallel_size": 4}, 131_072),  # a quarter on each
        ("cuda", "bf16", {"kv_cache": "slots", "max_num_seqs": 64}, 8192),
        ("cuda", "bf16", {"kv_cache": "slots", "max_num_seqs": 2}, 131_072),
        ("tensorrt", "fp16", {}, 16_384),  # 8 GiB / 8 / 57,344 = 18,724
        ("onnx", "fp16", {}, 4096),  # 2 GiB / 8 / 57,344 = 4,681
        ("onnx", "fp32", {}, 2048),
        ("onnx", "fp16", {"max_num_seqs": 1}, 8192),  # it would be 37,449 by memory
        ("onnx", "fp16", {"max_num_seqs": 100_000}, 2),
        ("cuda", "bf16", {}, 131_072),  # pages: one sequence of 7 GiB fits; how many more, lengths say
        ("cuda", "fp8", {"max_num_seqs": 256}, 131_072),
    ],
)
def test_the_default_is_what_fits(
    model: ModelSpec, target: str, precision: str, settings: dict[str, Any], tokens: int
) -> None:
    assert chosen(model, target, precision, settings=settings).tokens == tokens


def test_the_line_says_why(model: ModelSpec) -> None:
    assert chosen(model, "cuda", "bf16", settings={"kv_cache": "slots"}).describe() == (
        "max_seq_len 32,768 (the model's own 131,072 would need 112.0 GiB of cache for 16 sequences, the default share "
        "of each GPU is 32.0 GiB; --max-seq-len sets it)"
    )
    own = chosen(replace(model, max_position_embeddings=1000), "cuda", "bf16")
    assert own.describe() == "max_seq_len 1,000 (the model's own; --max-seq-len sets it)"
    slow = chosen(model, "onnx", settings={"max_num_seqs": 1})
    assert slow.describe() == (
        "max_seq_len 8,192 (the model's own is 131,072, but target onnx slows down with the length; --max-seq-len "
        "sets it)"
    )


def test_a_scoring_model_has_no_cache(model: ModelSpec) -> None:
    assert chosen(model, "onnx", task="score").tokens == 2048
    assert chosen(replace(model, max_position_embeddings=512), "onnx", task="score").tokens == 512
