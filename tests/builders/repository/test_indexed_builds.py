"""Builds of a model with an indexer (DeepSeek-V3.2): texts that it chooses from, and shorter ones that need none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError, CheckpointError, UnsupportedError
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.repository.sequence_len import choose_max_seq_len
from deepseek_triton.builders.scoring.options import ScoringOptions
from deepseek_triton.builders.targets.artefacts.decoder_shape import decoder_shape
from deepseek_triton.builders.targets.plan.models import find_model
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.decoder.rope import RopeSpec
from deepseek_triton.ensemble.decoder.spec import ModelSpec
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from tests.builders.graph.test_parity import assert_agrees, graph_runner, greedy, prompt
from tests.support.checkpoints import load_reference, make_checkpoint, make_tokenizer, safetensors_bytes
from tests.support.fp8_checkpoints import BLOCKS, dequantized, write_fp8

TOPK = 20  # of the small checkpoints
Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, which no test changes."""
    return make_tokenizer(make_checkpoint(tmp_path_factory.mktemp("v32"), "v32", "bfloat16"))


def tensors_of(checkpoint: Path) -> Tensors:
    safetensors = pytest.importorskip("safetensors.numpy")
    found: Tensors = safetensors.load_file(checkpoint / "model.safetensors")
    return found


def copied(checkpoint: Path, directory: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """The checkpoint with other tensors, and other values in its configuration; None: without the key."""
    directory.mkdir(parents=True)
    values = {**json.loads((checkpoint / "config.json").read_text(encoding="utf-8")), **config}
    values = {key: value for key, value in values.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = tensors_of(checkpoint) if tensors is None else tensors
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return make_tokenizer(directory)


def as_v3(checkpoint: Path, directory: Path) -> Path:
    """The same decoder without its indexer, as a DeepSeek-V3."""
    tensors = {name: array for name, array in tensors_of(checkpoint).items() if ".indexer." not in name}
    return copied(
        checkpoint, directory, tensors, model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"],
        index_n_heads=None, index_head_dim=None, index_topk=None, layer_types=None, mlp_layer_types=None,
    )  # fmt: skip


def engine_of(checkpoint: Path, models: Path, **options: Any) -> Path:
    build(BuildOptions(checkpoint, "m", models, **options))
    return models / "m-engine" / "1"


@pytest.mark.slow
def test_an_engine_for_short_texts_has_no_indexer_and_the_same_numbers(indexed: Path, tmp_path: Path) -> None:
    short = engine_of(indexed, tmp_path / "short", max_seq_len=TOPK, precision="fp32")
    long = engine_of(indexed, tmp_path / "long", max_seq_len=3 * TOPK, precision="fp32")
    inputs = [{value.name for value in onnx.load(path / "model.onnx", load_external_data=False).graph.input}
              for path in (short, long)]  # fmt: skip
    assert inputs[1] - inputs[0] == {f"past_index_{layer}" for layer in range(Manifest.load(long).spec["num_layers"])}
    assert Manifest.load(short).spec["latent"]["indexer"] is None
    assert Manifest.load(long).spec["latent"]["indexer"] == {"num_heads": 16, "head_dim": 24, "topk": TOPK}
    runners = [OnnxRunner(path / "model.onnx", max_num_seqs=2, num_threads=1) for path in (short, long)]
    ids = prompt(TOPK // 2)
    logits = [runner.prefill(0, ids, 0) for runner in runners]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
    assert greedy(runners[0], ids, TOPK // 2) == greedy(runners[1], ids, TOPK // 2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_target_cuda_builds_the_decoder_of_v3_for_short_texts(precision: str, indexed: Path, tmp_path: Path) -> None:
    same = as_v3(indexed, tmp_path / "v3")
    options: dict[str, Any] = {"target": "cuda", "max_seq_len": TOPK, "precision": precision}
    if precision == "fp8":
        options["recipe"] = "fast"
    built = [engine_of(path, tmp_path / path.name / "models", **options) for path in (indexed, same)]
    assert (built[0] / "model.safetensors").read_bytes() == (built[1] / "model.safetensors").read_bytes()
    assert Manifest.load(built[0]).engine == Manifest.load(built[1]).engine


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"target": "cuda", "precision": "bf16"}, "target cuda"),
        ({"task": "score", "scoring": ScoringOptions(template="{text}", labels=("a", "b"))}, "task score"),
    ],
)
def test_long_texts_are_refused_where_no_indexer_is_computed(
    options: dict[str, Any], what: str, indexed: Path, tmp_path: Path
) -> None:
    reason = f"texts of more than 20 tokens need the model's indexer, which {what} doesn't compute; .*--max-seq-len 20"
    with pytest.raises(BuildError, match=reason):
        build(BuildOptions(indexed, "m", tmp_path / "models", max_seq_len=TOPK + 1, **options))
    assert not (tmp_path / "models").exists()


PRECISIONS = {"cuda": "bf16", "onnx": "fp32", "vllm": "stored"}


def test_a_length_that_was_not_asked_for_is_one_that_the_target_computes() -> None:
    spec = find_model("v3.2").spec

    def chosen(target: str, task: str = "generate", spec: ModelSpec = spec) -> tuple[int, str]:
        options = BuildOptions(Path("c"), "m", target=target, task=task, precision=PRECISIONS[target])
        found = choose_max_seq_len(options, spec)
        return found.tokens, found.reason

    assert chosen("cuda") == (2048, "the model's own is 163,840, but target cuda doesn't compute its indexer")
    assert chosen("onnx", "score") == (2048, "the model's own is 163,840, but task score doesn't compute its indexer")
    assert chosen("vllm")[0] > 2048
    assert chosen("onnx", "score", with_topk(spec, 4096)) == (2048, "the model's own is 163,840")
    assert spec.for_length(2048).cache_elements() == 61 * 576 and spec.for_length(2049).cache_elements() == 61 * 704


def with_topk(spec: ModelSpec, topk: int) -> ModelSpec:
    assert spec.latent is not None and spec.latent.indexer is not None
    return replace(spec, latent=replace(spec.latent, indexer=replace(spec.latent.indexer, topk=topk)))


@pytest.mark.parametrize(("target", "task"), [("cuda", "generate"), ("onnx", "score")])
def test_a_length_that_only_linear_scaling_allows_needs_the_indexer_too(target: str, task: str) -> None:
    rope = RopeSpec(scaling="linear", factor=4.0)
    spec = replace(with_topk(find_model("v3.2").spec, 20), max_position_embeddings=16, rope=rope)
    options = BuildOptions(Path("c"), "m", target=target, task=task, precision=PRECISIONS[target], max_seq_len=20)
    assert choose_max_seq_len(options, spec).tokens == 20
    with pytest.raises(BuildError, match="max_seq_len is 21: texts of more than 20 tokens need the model's indexer"):
        choose_max_seq_len(replace(options, max_seq_len=21), spec)


def test_no_kernel_is_given_an_indexer() -> None:
    with pytest.raises(BuildError, match="target cuda doesn't compute the indexer of deepseek_v32"):
        decoder_shape(find_model("v3.2").spec, 4096)


@pytest.mark.slow
def test_scores_of_short_texts_need_no_indexer(indexed: Path, tmp_path: Path) -> None:
    scoring = ScoringOptions(template="{text}", labels=("a", "b"))
    for path in (indexed, as_v3(indexed, tmp_path / "v3")):
        engine_of(path, tmp_path / path.name / "models", max_seq_len=TOPK, task="score", scoring=scoring)
    engines = [tmp_path / name / "models" / "m-engine" / "1" for name in (indexed.name, "v3")]
    first, second = ((path / "scoring.onnx").read_bytes() for path in engines)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DeepSeek", "powers of two"])
def test_an_fp8_checkpoint_with_scales_for_blocks(kind: str, tmp_path: Path) -> None:
    """As DeepSeek's own: the indexer's two matrices are FP8 too, its weights for heads and its norm aren't."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    path = write_fp8(tmp_path / "c", BLOCKS[kind], "v32")
    stored = safetensors.load_file(path / "model.safetensors")
    fp8 = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn and ".indexer." in name}
    assert {name.split(".indexer.")[1] for name in fp8} == {"wq_b.weight", "wk.weight"}
    tensors = {name: tensor.numpy() for name, tensor in dequantized(path, BLOCKS[kind]).items()}
    plain = copied(path, tmp_path / "plain", tensors, quantization_config=None)
    assert_agrees(graph_runner(path, tmp_path, max_seq_len=256), load_reference(plain), prompt(60))


@pytest.mark.slow
@pytest.mark.parametrize("max_seq_len", [TOPK, 3 * TOPK])
def test_fp8_leaves_the_indexer_as_it_is(max_seq_len: int, indexed: Path, tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text("a text to calibrate with " * 99, encoding="utf-8")
    engine = engine_of(indexed, tmp_path / "models", precision="fp8", max_seq_len=max_seq_len, calibration_text=text)
    graph = onnx.load(engine / "model.onnx", load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    own = {name.rpartition("indexer.")[2] for name in types if ".indexer.w" in name}
    assert own == (set() if max_seq_len == TOPK else {"wq_b.weight", "wk.weight", "weights_proj.weight"})
    assert onnx.TensorProto.FLOAT8E4M3FN not in {kind for name, kind in types.items() if ".indexer." in name}
    assert types["model.layers.0.self_attn.q_b_proj.weight"] == onnx.TensorProto.FLOAT8E4M3FN
    runner = OnnxRunner(engine / "model.onnx", max_num_seqs=1, num_threads=1)
    assert np.isfinite(runner.prefill(0, prompt(max_seq_len), 0)).all()


def test_a_checkpoint_opened_again_keeps_the_spec_of_the_build(indexed: Path) -> None:
    checkpoint = open_checkpoint(indexed)
    checkpoint.spec = checkpoint.spec.for_length(TOPK)
    assert checkpoint.reopened().spec == checkpoint.spec != open_checkpoint(indexed).spec


def test_damaged_and_odd_checkpoints_are_named(indexed: Path, tmp_path: Path) -> None:
    tensors = tensors_of(indexed)
    name = "model.layers.1.self_attn.indexer.k_norm.bias"
    without = {key: array for key, array in tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        open_checkpoint(copied(indexed, tmp_path / "missing", without))
    cut = {**tensors, name: tensors[name][:-1]}
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[23\], expected \[24\]"):
        open_checkpoint(copied(indexed, tmp_path / "cut", cut))
    for key, value, error, message in (
        ("index_head_dim", 4, CheckpointError, "index_head_dim is 4, must hold the 8 rotary channels"),
        ("index_topk", 0, CheckpointError, "index_topk is 0, must be a positive whole number"),
        ("rope_interleave", False, UnsupportedError, "rope_interleave False: not supported"),
        (
            "mlp_layer_types",
            ["sparse"] * 3,
            UnsupportedError,
            r"mlp_layer_types \['sparse', .* first_k_dense_replace 1",
        ),
        ("layer_types", ["full_attention"] * 2, CheckpointError, "layer_types is .*must be a list with 3 entries"),
    ):
        with pytest.raises(error, match=message):
            open_checkpoint(copied(indexed, tmp_path / key, None, **{key: value}))


def test_an_indexer_needs_a_query_of_two_matrices(indexed: Path, tmp_path: Path) -> None:
    path = copied(indexed, tmp_path / "one")
    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**values, "q_lora_rank": None}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="an indexer needs q_lora_rank"):
        open_checkpoint(path)


@pytest.mark.slow
def test_the_choice_among_equal_scores_is_the_same_in_any_batch_and_chunk(indexed: Path, tmp_path: Path) -> None:
    """An indexer whose scores are all 0: which positions are chosen is the graph's to say."""
    tensors = {
        name: np.zeros_like(array) if name.endswith("indexer.weights_proj.weight") else array
        for name, array in tensors_of(indexed).items()
    }
    source = open_checkpoint(copied(indexed, tmp_path / "equal", tensors))
    path = build_graph(source.spec, source.read, tmp_path, max_seq_len=128)
    runner = OnnxRunner(path, max_num_seqs=2, num_threads=1)
    ids = prompt(60)
    whole = runner.prefill(0, ids, 0).copy()
    for start in range(0, 60, 7):
        chunked = runner.prefill(1, ids[start : start + 7], start)
    np.testing.assert_allclose(chunked, whole, atol=1e-4)


def test_float16_keeps_the_indexers_scores_in_float32(indexed: Path, tmp_path: Path) -> None:
    source = open_checkpoint(indexed)
    path = build_graph(source.spec, source.read, tmp_path, max_seq_len=128, precision="fp16")
    graph = onnx.load(path, load_external_data=False).graph
    types = {tensor.name.rpartition("indexer.")[2]: tensor.data_type for tensor in graph.initializer}
    assert types["weights_proj.weight"] == onnx.TensorProto.FLOAT and types["wk.weight"] == onnx.TensorProto.FLOAT16
    runner = OnnxRunner(path, max_num_seqs=1, num_threads=1)
    assert np.isfinite(runner.prefill(0, prompt(60), 0)).all()


def test_more_tokens_than_positions_are_never_chosen(indexed: Path, tmp_path: Path) -> None:
    """A graph made for fewer positions than the indexer chooses, as calibration makes them, sees every one."""
    source = open_checkpoint(indexed)
    runners = []
    for spec, name in ((source.spec, "with"), (source.spec.for_length(TOPK), "without")):
        (tmp_path / name).mkdir()
        path = build_graph(spec, source.read, tmp_path / name, max_seq_len=TOPK - 4, precision="fp32")
        runners.append(OnnxRunner(path, max_num_seqs=1, num_threads=1))
    ids = prompt(TOPK - 4)
    first, second = (runner.prefill(0, ids, 0) for runner in runners)
    np.testing.assert_array_equal(first, second)
