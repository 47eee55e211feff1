"""Latent attention and experts on ONNX Runtime against transformers: every option, and every known trap."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deepseek_triton.builders.checkpoint import hugging_face
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.graph.decoder import build_graph
from deepseek_triton.builders.graph.parts import mla
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.builders.scoring.options import Batching, ScoringOptions
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from deepseek_triton.ensemble.decoder.mla import INDEX_BIAS, INDEX_K, INDEX_NORM, INDEX_Q
from deepseek_triton.ensemble.engine.runners.load import load_scoring_runner
from deepseek_triton.ensemble.engine.runners.onnx.runner import OnnxRunner
from deepseek_triton.ensemble.scoring.rows import make_row
from deepseek_triton.ensemble.scoring.settings import ScoringSettings
from tests.builders.graph.test_parity import assert_agrees, graph_runner, greedy, prompt
from tests.support.checkpoints import LATENT_OPTIONS, bias_experts, load_reference, make_checkpoint, make_tokenizer

torch = pytest.importorskip("torch")

TOLERANCE = 1e-3
Array = np.ndarray[Any, np.dtype[Any]]


@pytest.mark.slow
@pytest.mark.parametrize("option", LATENT_OPTIONS)
def test_logits_and_greedy_tokens_are_those_of_transformers(option: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", option)
    runner = graph_runner(checkpoint, tmp_path, max_seq_len=256)
    reference = load_reference(checkpoint)
    # The stretched ones were trained with 64 positions; the others end at 256.
    assert_agrees(runner, reference, prompt(90))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["v2-lite", "v3-stretched", "v32-stretched"])
def test_opset_23_agrees_too(option: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", option)
    assert_agrees(graph_runner(checkpoint, tmp_path, opset=23), load_reference(checkpoint), prompt())


@pytest.mark.slow
@pytest.mark.parametrize("option", ["v2", "v3", "v32"])
def test_absorbed_and_decompressed_attention_agree(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", option)
    ids = prompt(60)
    logits = []
    for most in (0, 1000):
        monkeypatch.setattr(mla, "break_even", lambda part, most=most: most)
        runner = graph_runner(checkpoint, tmp_path)
        whole = runner.prefill(0, ids, 0).copy()
        for start in range(0, 60, 7):
            chunked = runner.prefill(1, ids[start : start + 7], start)
        np.testing.assert_allclose(chunked, whole, atol=1e-4)
        logits.append(whole)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


def test_a_few_positions_read_the_latents_and_many_make_keys() -> None:
    from deepseek_triton.ensemble.decoder.mla import LatentAttention
    from deepseek_triton.ensemble.decoder.options import LatentOptions

    assert mla.break_even(LatentAttention(7168, 128, LatentOptions(1536, 512, 128, 64, 128))) == 157


@pytest.mark.slow
@pytest.mark.parametrize(("option", "changes"), [("v2", {}), ("v32", {"index_topk": 140})])
def test_what_is_filled_gives_the_bits_of_the_whole_cache(option: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """On a CPU attention sees steps of 128 positions; 300 isn't a multiple of them."""
    path = make_checkpoint(tmp_path / "hf", option, **changes)
    seen, whole = (graph_runner(path, tmp_path, max_seq_len=300, fuses=fuses) for fuses in (True, False))
    for length in (1, 127, 128, 129, 250, 299):
        ids = prompt(length)
        np.testing.assert_array_equal(seen.prefill(0, ids, 0), whole.prefill(0, ids, 0))
    lengths = np.array([250, 40, 128])
    for runner in (seen, whole):
        for slot, length in enumerate(lengths):
            runner.prefill(slot, prompt(length), 0)
    step = np.array([3, 5, 7]), lengths
    np.testing.assert_array_equal(seen.decode(*step), whole.decode(*step))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["v2", "v3", "v32"])
def test_padding_takes_no_part_in_a_batch(option: str, tmp_path: Path) -> None:
    runner = graph_runner(make_checkpoint(tmp_path / "checkpoint", option), tmp_path)
    prompts = [prompt(length, seed=length) for length in (3, 40, 17)]
    alone = [greedy(runner, ids, 12) for ids in prompts]
    padded = np.zeros((3, 40), np.int64)
    for index, ids in enumerate(prompts):
        padded[index, : len(ids)] = ids
    lens = np.array([len(ids) for ids in prompts])
    logits = runner._run(0, padded, np.zeros(3, np.int64), lens)
    tokens = [[int(row.argmax())] for row in logits]
    for step in range(11):
        logits = runner.decode(np.array([row[-1] for row in tokens]), lens + step)
        for own, scores in zip(tokens, logits, strict=True):
            own.append(int(scores.argmax()))
    assert tokens == alone


@pytest.mark.slow
def test_float16_is_close(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "v3", "bfloat16")
    exact = graph_runner(checkpoint, tmp_path).prefill(0, prompt(), 0).copy()
    half = graph_runner(checkpoint, tmp_path, precision="fp16").prefill(0, prompt(), 0)
    assert np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.slow
def test_scores_are_those_of_transformers_with_and_without_a_prefix(tmp_path: Path) -> None:
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "v3-stretched"))
    scoring = ScoringOptions(template="Is it so: {text}?", labels=("a", "b"), batching=Batching(max_batch_size=4))
    build(BuildOptions(checkpoint, "s", tmp_path / "models", task="score", max_seq_len=128, scoring=scoring))
    directory = tmp_path / "models" / "s-engine" / "1"
    prefix = Manifest.load(directory).engine["prefix_ids"]
    assert len(prefix) > 5
    reference = load_reference(checkpoint)
    label = np.array([5, 6, 7], np.int32)
    prompts = [np.array([*prefix, *prompt(20)]), prompt(90, seed=2)]
    rows = [make_row(ids.astype(np.int32), [label, label[:1]])[0] for ids in prompts]
    found = load_scoring_runner(directory, ScoringSettings(num_threads=1)).score(rows)
    for ids, scores in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([*ids, *label[:-1]])[None]).logits[0]
        log_probs = torch.log_softmax(logits, -1)[len(ids) - 1 :]
        expected = [float(log_probs[place, token]) for place, token in enumerate(label)]
        np.testing.assert_allclose(scores.log_probs, [*expected, expected[0]], atol=TOLERANCE)


def test_experts_are_written_one_by_one(tmp_path: Path) -> None:
    """Of the weights that the graph's builder reads, few are held at any time, however many experts there are."""
    source = open_checkpoint(make_checkpoint(tmp_path / "c", "v3", n_routed_experts=32, n_group=4))
    held: dict[int, int] = {}
    most = 0

    def read(name: str) -> Array:
        nonlocal most
        array = source.read(name).copy()
        held[id(array)] = array.nbytes
        weakref.finalize(array, held.pop, id(array))
        most = max(most, sum(held.values()))
        return array

    spec = source.spec
    build_graph(spec, read, tmp_path, max_seq_len=64, precision="fp32")
    largest = max(int(np.prod(shape)) for shape in spec.tensor_shapes().values()) * 4
    experts = sum(
        int(np.prod(shape))
        for name, shape in spec.tensor_shapes().items()
        if name.startswith("model.layers.1.mlp.experts")
    )
    assert most <= 2 * largest < experts * 4


@pytest.mark.parametrize("length", [1, 90])  # read from the latents, and from keys made of them
def test_an_expert_that_no_token_chose_is_not_computed(length: int, tmp_path: Path) -> None:
    source = open_checkpoint(make_checkpoint(tmp_path / "checkpoint", "v3", n_group=1, topk_group=1))

    def read(name: str, *, damaged: bool) -> Array:
        values = source.read(name).copy()
        if name.endswith("e_score_correction_bias"):
            values[5] = -1000.0
        if damaged and ".experts.5." in name:
            values[:] = 1e38  # whose products overflow: 0 times them is no number
        return values

    logits = []
    for damaged in (False, True):
        (tmp_path / str(damaged)).mkdir()
        path = build_graph(
            source.spec, partial(read, damaged=damaged), tmp_path / str(damaged), max_seq_len=128, precision="fp32"
        )  # fmt: skip
        logits.append(OnnxRunner(path, max_num_seqs=1, num_threads=2).prefill(0, prompt(length), 0).copy())
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_refuses_and_says_why(target: str, tmp_path: Path) -> None:
    checkpoint = make_tokenizer(make_checkpoint(tmp_path / "checkpoint", "v3"))
    with pytest.raises(BuildError, match=r"doesn't build the latent attention of .*deepseek_v3: TensorRT has no layer"):
        build(BuildOptions(checkpoint, "m", tmp_path / "models", target=target, precision="fp16", max_seq_len=64))


# ---- what others computed wrongly: each is put in, and shows


def half_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "halves_from_pairs", lambda rows, rotary: rows)


def no_eps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "INNER_NORM_EPS", None)


def unstretched_softmax(spec: Any) -> Any:
    return replace(spec, latent=replace(spec.latent, softmax_factor=1.0))


def mscale_all_dim_alone(spec: Any) -> Any:
    return replace(spec, rope=replace(spec.rope, attention_factor=spec.latent.softmax_factor**0.5))


def unnormalised(spec: Any) -> Any:
    return replace(spec, experts=replace(spec.experts, is_normalised=not spec.experts.is_normalised))


def bias_in_bfloat16(read: Callable[[str], Array], name: str) -> Array:
    values = read(name)
    if not name.endswith("e_score_correction_bias"):
        return values
    rounded: Array = torch.from_numpy(values).bfloat16().float().numpy()
    return rounded


def default_scale(node: onnx.NodeProto) -> None:
    if node.op_type == "Attention":
        del node.attribute[:]


def bias_in_the_weights(node: onnx.NodeProto) -> None:
    if node.name.endswith("router.chosen_scores"):
        node.input[0] = node.input[0].replace(".scores", ".biased")


def group_score_by_maximum(node: onnx.NodeProto) -> None:
    if node.name.endswith("router.group_scores"):
        node.op_type = "ReduceMax"


def largest_difference(
    option: str,
    directory: Path,
    *,
    spec: Callable[[Any], Any] = lambda spec: spec,
    read: Callable[[Callable[[str], Array], str], Array] = lambda read, name: read(name),
    node: Callable[[onnx.NodeProto], None] = lambda node: None,
    bias: float = 0.0,
    **config: Any,
) -> float:
    """Of the logits of a prompt and of a decoded token, past the trained length, from transformers'."""
    checkpoint = make_checkpoint(directory / "checkpoint", option, **config)
    reference = load_reference(checkpoint)
    if bias:
        bias_experts(reference, mean=bias, std=0.02)
        reference.save_pretrained(checkpoint)
    source = open_checkpoint(checkpoint)
    path = build_graph(
        spec(source.spec), lambda name: read(source.read, name), directory, max_seq_len=128, precision="fp32"
    )
    model = onnx.load(path, load_external_data=False)
    for each in nodes_of(model.graph):
        node(each)
    onnx.save(model, path)
    runner = OnnxRunner(path, max_num_seqs=1, num_threads=2)
    ids = prompt(101)
    with torch.no_grad():
        expected = reference(torch.tensor(ids)[None]).logits[0, -2:].numpy()
    found = runner.prefill(0, ids[:100], 0).copy(), runner.decode(ids[100:], np.array([100]))[0]
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(found, expected, strict=True))


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for each in inner for node in nodes_of(each))]


def indexed(order: Array) -> Callable[[Callable[[str], Array], str], Array]:
    """Reads a checkpoint with the channels of each head of the indexer in another order."""

    def read(read: Callable[[str], Array], name: str) -> Array:
        values = read(name)
        if not name.endswith((INDEX_Q, INDEX_K, INDEX_NORM, INDEX_BIAS)):
            return values
        return values.reshape(-1, len(order), values.size // len(values))[:, order].reshape(values.shape)

    return read


def chosen_before_the_mask(node: onnx.NodeProto) -> None:
    if node.name.endswith("indexer.mask.ranked"):
        node.input[2] = node.input[1]


def products_below_zero(node: onnx.NodeProto) -> None:
    if node.op_type == "Relu":
        node.op_type = "Identity"


def rms_norm_of_the_key(node: onnx.NodeProto) -> None:
    if node.op_type == "LayerNormalization":
        node.op_type = "RMSNormalization"
        del node.input[2]


def every_token_attended(spec: Any) -> Any:
    return replace(spec, latent=replace(spec.latent, indexer=None))


# The indexer's rotary channels are the first 8 of 24: halves, not pairs.
PAIRS = np.array([*range(0, 8, 2), *range(1, 8, 2), *range(8, 24)])
ROTARY_LAST = np.roll(np.arange(24), 8)

TRAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "correction bias in bfloat16": ("v3", {"read": bias_in_bfloat16, "bias": 8.0}),
    "correction bias in the weights": ("v3", {"node": bias_in_the_weights}),
    "group score by the maximum": ("v3", {"node": group_score_by_maximum}),
    "attention without its scale": ("v3", {"node": default_scale}),
    "weights not normalised": ("v3", {"spec": unnormalised}),
    "weights normalised": ("v2", {"spec": unnormalised}),
    "softmax factor missing, V2": ("v2-lite", {"spec": unstretched_softmax}),
    "softmax factor missing, V3": ("v3-stretched", {"spec": unstretched_softmax}),
    "mscale_all_dim alone on cos and sin": ("v3-stretched", {"spec": mscale_all_dim_alone}),
    "no indexer": ("v32", {"spec": every_token_attended}),
    "an indexer's rope in pairs": ("v32", {"read": indexed(PAIRS)}),
    "an indexer's rope on the last channels": ("v32", {"read": indexed(ROTARY_LAST)}),
    "tokens chosen among later ones too": ("v32", {"node": chosen_before_the_mask}),
    "an indexer's products below zero": ("v32", {"node": products_below_zero}),
    "an indexer's key under an RMS norm": ("v32", {"node": rms_norm_of_the_key}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_would_show(name: str, tmp_path: Path) -> None:
    option, trap = TRAPS[name]
    right = {"bias": trap["bias"]} if "bias" in trap else {}
    assert largest_difference(option, tmp_path, **right) <= TOLERANCE
    assert largest_difference(option, tmp_path, **trap) > 20 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trap", "config"),
    [(half_split, {}), (no_eps_of_their_own, {"rms_norm_eps": 0.05})],
    ids=["half-split rope", "rms_norm_eps in the inner norms"],
)
@pytest.mark.parametrize("option", ["v2", "v3"])
def test_a_trap_in_the_code_would_show(
    option: str,
    trap: Callable[[pytest.MonkeyPatch], None],
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert largest_difference(option, tmp_path, **config) <= TOLERANCE
    trap(monkeypatch)
    assert largest_difference(option, tmp_path, **config) > 20 * TOLERANCE
