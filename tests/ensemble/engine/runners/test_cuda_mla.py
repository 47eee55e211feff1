"""Latent attention in the cuda runner: against float64 with each head's own keys, in every form of the cache."""

# without triton the file is skipped before it imports what needs it

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.cuda_device import DEVICE, DTYPE, HAS_GPU, no_more_memory  # isort: skip  # before triton

from benchmarks.cuda_reference import Reference
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.check import check_repository
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.targets.artefacts.cuda_weights import write_weights
from deepseek_triton.builders.targets.artefacts.decoder_shape import decoder_shape
from deepseek_triton.ensemble.artefacts.cuda_layout import DecoderShape
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.decoder.options import LatentOptions
from deepseek_triton.ensemble.decoder.part import WHOLE, Shard
from deepseek_triton.ensemble.engine.runners.base import PromptChunk, RunnerError
from deepseek_triton.ensemble.engine.runners.cuda.pages import CacheForm
from deepseek_triton.ensemble.engine.runners.cuda.runner import CudaRunner
from deepseek_triton.ensemble.engine.runners.cuda.weights import RandomWeights, StoredWeights
from deepseek_triton.ensemble.protocol.settings import KvCache
from tests.support.checkpoints import load_reference, make_checkpoint, make_tokenizer

# The interpreter computes masked lanes too, and makes numbers of arrays.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("RuntimeWarning", "DeprecationWarning")]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")]

LATENT = LatentOptions(
    q_lora_rank=None, kv_lora_rank=48, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=32, softmax_factor=1.3
)
SHAPE = DecoderShape(
    vocab_size=96, hidden_size=64, intermediate_size=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=40,
    rms_norm_eps=1e-3, max_seq_len=150, latent=LATENT,
)  # fmt: skip
# DeepSeek-V2-Lite's attention, which the sizes of tiles are made for.
LARGE = replace(
    SHAPE, hidden_size=512, intermediate_size=512, num_heads=16, num_kv_heads=16, head_dim=192, max_seq_len=1200,
    latent=LatentOptions(None, 512, 128, 64, 128, softmax_factor=1.59),
)  # fmt: skip
SHAPES = {
    "one query matrix": SHAPE,
    "two query matrices": replace(SHAPE, num_layers=2, latent=replace(LATENT, q_lora_rank=32)),
    "many heads": replace(SHAPE, num_heads=20, num_kv_heads=20),
}
Ids = NDArray[np.int64]


class Weights(RandomWeights):
    """Biases on what a checkpoint with attention_bias has them on; norms that aren't 1."""

    def __init__(self, shape: DecoderShape, *, is_fp8: bool) -> None:
        super().__init__(shape, is_fp8=is_fp8, has_qkv_bias=False, seed=3)
        names = frozenset(name for name in shape.linear_names() if not name.endswith("kv_b"))
        biased = frozenset(name for name in names if name.endswith((".q_kv_a", ".q_b", ".o")))
        self.entries = shape.entries(names if is_fp8 else frozenset(), biased)

    def load(self, name: str, device: torch.device, shard: Shard = WHOLE) -> torch.Tensor:
        made = super().load(name, DEVICE, shard)
        if name.endswith("a_norm"):
            made = made * torch.linspace(0.5, 1.5, len(made), device=DEVICE)
        return made.to(device)


def make(
    shape: DecoderShape = SHAPE, *, is_fp8: bool = False, kind: KvCache = "pages", tokens: int = 0, **more: Any
) -> CudaRunner:
    options: dict[str, Any] = {"dtype": DTYPE, "device": str(DEVICE), "max_num_batched_tokens": 64, "max_num_seqs": 3}
    runner = CudaRunner(Weights(shape, is_fp8=is_fp8), shape, cache_form=CacheForm(kind, tokens), **{**options, **more})
    if kind == "pages":  # blocks in no order
        width = -(-shape.max_seq_len // runner.block_size)
        blocks = 1 + np.random.default_rng(0).permutation(runner.num_blocks)[: runner.max_num_seqs * width]
        for slot, own in enumerate(blocks.reshape(runner.max_num_seqs, width).tolist()):
            runner.set_blocks(slot, 0, own)
    return runner


def text(length: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, SHAPE.vocab_size, length)


def cosine(found: NDArray[np.float32], wanted: torch.Tensor) -> float:
    a, b = torch.from_numpy(np.array(found)).double(), wanted
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize(
    ("name", "is_fp8"), [("one query matrix", True), ("two query matrices", False), ("many heads", False)]
)
def test_logits_are_those_of_the_decoder_in_float64(name: str, is_fp8: bool) -> None:
    shape = SHAPES[name]
    runner, reference = make(shape, is_fp8=is_fp8), Reference(shape, Weights(shape, is_fp8=is_fp8))
    # FP8: a value on the border between two codes may fall either way, and moves what follows.
    least = 0.98 if is_fp8 else 0.9995 if HAS_GPU else 0.999999
    a, b = text(80), text(6, seed=1)
    wanted = [reference.logits(ids.tolist()) for ids in (a, b)]
    packed = runner.prefill_many([PromptChunk(2, b[:3], 0), PromptChunk(0, a[:40], 0)])
    assert cosine(packed[0], wanted[1][2]) > least
    assert cosine(packed[1], wanted[0][39]) > least
    assert cosine(runner.prefill(0, a[40:75], 40), wanted[0][74]) > least, "a prompt's second chunk"
    together = runner.decode(np.array([a[75], 0, b[3]]), np.array([75, -1, 3]))
    assert cosine(together[0], wanted[0][75]) > least
    assert cosine(together[2], wanted[1][3]) > least
    assert cosine(runner.decode(a[76:77], np.array([76]))[0], wanted[0][76]) > least, "batch 1"
    runner.close()


@pytest.mark.parametrize("kind", ["slots", "pages"])
def test_a_prompt_in_chunks_and_by_tokens_gives_the_whole_ones_logits(kind: KvCache) -> None:
    runner, ids = make(kind=kind, max_num_batched_tokens=80), text(76)
    whole = runner.prefill(1, ids, 0).copy()
    for start in range(0, 72, 24):
        runner.prefill(0, ids[start : start + 24], start)
    for position in range(72, 76):
        stepped = runner.decode(ids[position : position + 1], np.array([position]))[0]
    # In bfloat16 the two forms round at different places.
    np.testing.assert_allclose(stepped, whole, atol=0.05 * np.abs(whole).max() if HAS_GPU else 1e-4)
    runner.close()


def test_an_int8_cache_is_refused_by_name() -> None:
    with pytest.raises(RunnerError, match="kv_cache is pages-int8: latent attention has no INT8 cache; use pages"):
        make(kind="pages-int8")


CHECKPOINTS = [
    "v2-lite",
    pytest.param("v3-stretched", marks=pytest.mark.slow),
    pytest.param("v3-one-group", marks=pytest.mark.slow),
    pytest.param("v3-halves", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("option", CHECKPOINTS)
def test_a_built_decoders_logits_are_those_of_transformers_past_the_trained_length(option: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", option, "bfloat16", num_hidden_layers=2)
    spec = open_checkpoint(checkpoint).spec
    written = write_weights(spec, open_checkpoint(checkpoint).read, tmp_path, max_seq_len=128)
    shape = decoder_shape(spec, 128)
    runner = CudaRunner(
        StoredWeights(written.path), shape, max_num_seqs=1, max_num_batched_tokens=80, device=str(DEVICE),
        dtype=torch.float32,  # in bfloat16 a router may choose another expert
    )  # fmt: skip
    ids = text(81)
    with torch.no_grad():
        expected = load_reference(checkpoint)(torch.tensor(ids)[None]).logits[0].double()
    assert cosine(runner.prefill(0, ids[:80], 0), expected[79]) > 0.9999999
    found = runner.decode(ids[80:], np.array([80]))[0]
    assert cosine(found, expected[80]) > 0.9999999
    np.testing.assert_allclose(found, expected[80].numpy(), atol=1e-3)


def test_a_manifest_of_an_engine_keeps_its_latent_attention(tmp_path: Path) -> None:
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "v2-lite", "bfloat16"))
    options = BuildOptions(
        checkpoint, "lite", tmp_path / "models", target="cuda", precision="bf16", max_seq_len=64,
        settings={"kv_cache": "pages"},
    )  # fmt: skip
    build(options)
    engine = Manifest.load(tmp_path / "models" / "lite-engine" / "1").engine
    assert DecoderShape.from_dict(engine) == decoder_shape(open_checkpoint(checkpoint).spec, 64)
    assert check_repository(tmp_path / "models") == []
    with pytest.raises(BuildError, match="kv_cache is pages-int8: latent attention has no INT8 cache"):
        build(replace(options, settings={"kv_cache": "pages-int8"}))


# ---- on a GPU, at the size of DeepSeek-V2-Lite


@pytest.mark.parametrize("is_fp8", [pytest.param(False, marks=gpu), pytest.param(True, marks=gpu)])
def test_long_texts_are_split_and_still_right(is_fp8: bool) -> None:
    runner, ids = make(LARGE, is_fp8=is_fp8, max_num_batched_tokens=1024), text(1100)
    wanted = Reference(LARGE, Weights(LARGE, is_fp8=is_fp8)).logits(ids.tolist())
    least = 0.98 if is_fp8 else 0.9995
    assert cosine(runner.prefill(0, ids[:900], 0), wanted[899]) > least
    assert cosine(runner.prefill(0, ids[900:1000], 900), wanted[999]) > least
    for position in range(1000, 1100):
        found = runner.decode(ids[position : position + 1], np.array([position]))[0]
    assert cosine(found, wanted[1099]) > least
    runner.close()


@pytest.mark.parametrize("shape", [pytest.param(LARGE, marks=gpu)])
def test_a_step_asks_for_no_memory(shape: DecoderShape) -> None:
    runner = make(shape, is_fp8=True)

    def run() -> None:
        runner.prefill(0, text(50), 0)
        for position in range(50, 55):
            runner.decode(text(2), np.array([position, -1]))

    run()
    with no_more_memory():
        run()
    runner.close()


@pytest.mark.parametrize("shape", [pytest.param(replace(LARGE, num_heads=128, num_kv_heads=128), marks=gpu)])
def test_as_many_heads_as_v3_has(shape: DecoderShape) -> None:
    runner, ids = make(shape), text(140)
    wanted = Reference(shape, Weights(shape, is_fp8=False)).logits(ids.tolist())
    for start in (0, 64):
        found = runner.prefill(0, ids[start : start + 64], start)
    assert cosine(found, wanted[127]) > 0.9995
    for position in range(128, 140):
        found = runner.decode(ids[position : position + 1], np.array([position]))[0]
    assert cosine(found, wanted[139]) > 0.9995
    runner.close()


@pytest.mark.parametrize("shape", [pytest.param(LARGE, marks=gpu)])
def test_batch_invariant_tokens_do_not_depend_on_the_others(shape: DecoderShape) -> None:
    runner = make(shape, is_fp8=True, is_invariant=True, max_num_seqs=40)
    runner.prefill(0, text(60), 0)
    alone = runner.decode(text(1), np.array([60]))[0].copy()
    for slot in range(1, 40):
        runner.prefill(slot, text(30, seed=slot), 0)
    positions = np.array([60, *[30] * 39])
    np.testing.assert_array_equal(runner.decode(np.array([text(1)[0], *text(39, seed=9)]), positions)[0], alone)
    runner.close()
