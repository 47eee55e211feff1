"""Pruned checkpoints: what is left computes what it must, loads in transformers, builds, and knows its parent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantization

from deepseek_triton.builders import cli
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.errors import BuildError
from deepseek_triton.builders.lifecycle.provenance import provenance_of
from deepseek_triton.builders.lifecycle.pruning.options import PruneOptions
from deepseek_triton.builders.lifecycle.pruning.prune import prune
from deepseek_triton.builders.repository.build import build
from deepseek_triton.builders.repository.options import BuildOptions
from deepseek_triton.ensemble.artefacts.manifest import Manifest
from tests.builders.graph.test_parity import graph_runner, prompt
from tests.support.checkpoints import load_reference, make_checkpoint, make_tokenizer
from tests.support.gguf_files import write_gguf

torch = pytest.importorskip("torch")

TOLERANCE = 1e-3
Array = np.ndarray[Any, np.dtype[Any]]
Make = Callable[..., Path]


@pytest.fixture
def parent(tmp_path: Path) -> Make:
    def make(option: str = "llama", **more: Any) -> Path:
        return make_tokenizer(make_checkpoint(tmp_path / "parent", option, **more))

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, np.random.default_rng(0).integers(33, 126, 600))), encoding="utf-8")
    return path


def pruned(checkpoint: Path, **options: Any) -> Path:
    output = checkpoint.parent / f"pruned-{len(list(checkpoint.parent.iterdir()))}"
    defaults: dict[str, Any] = {"multiple_of": 1, "ratio": 0.25}
    prune(PruneOptions(checkpoint, output, **{**defaults, **options}))
    return output


def logits_of(model: Any, length: int = 40) -> Array:
    with torch.no_grad():
        logits: Array = model(torch.tensor(prompt(length))[None]).logits[0].numpy()
    return logits


def assert_ours(directory: Path, tmp_path: Path) -> None:
    """transformers and this project's graph compute the same from a checkpoint."""
    ids = prompt(40)
    expected = logits_of(load_reference(directory))[-1]
    assert np.abs(graph_runner(directory, tmp_path).prefill(0, ids, 0) - expected).max() <= TOLERANCE


CASES = [
    ("llama", "l1", "ffn"), ("llama", "l1", "heads"), ("llama", "l1", "layers"), ("llama", "activation", "ffn"),
    ("llama", "activation", "heads"), ("llama", "activation", "layers"), ("llama", "depth", "layers"),
    ("llama-biases", "activation", "ffn"), ("llama-biases", "l1", "heads"), ("qwen2-tied-yarn", "activation", "heads"),
    ("qwen3", "l1", "heads"), ("qwen3", "activation", "ffn"),
]  # fmt: skip
REFITTED = [("activation", "ffn"), ("activation", "heads")]
LATENT_CASES = [
    ("v2", "experts", "experts"), ("v2-groups", "experts", "experts"), ("v3", "experts", "experts"),
    ("v2-lite", "l1", "heads"), ("v3", "activation", "heads"), ("v3-halves", "l1", "heads"), ("v2", "l1", "ffn"),
    ("v3", "activation", "ffn"), ("v2-experts-everywhere", "activation", "ffn"), ("v3-stretched", "depth", "layers"),
    ("v32", "activation", "heads"), ("v32", "depth", "layers"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("option", "method", "what"), CASES)
def test_what_is_left_loads_in_transformers_with_our_logits(
    option: str, method: str, what: str, parent: Make, text: Path, tmp_path: Path
) -> None:
    source = parent(option)
    more = {} if method == "l1" else {"text": text}
    output = pruned(source, method=method, what=what, ratio=0.5, is_refitted=(method, what) in REFITTED, **more)
    before, after = open_checkpoint(source), open_checkpoint(output)
    assert after.spec.num_parameters() < before.spec.num_parameters()
    assert after.notes == ()
    expected = {"ffn": (56, 4, 3), "heads": (112, 2, 3), "layers": (112, 4, 2)}[what]
    assert (after.spec.intermediate_size, after.spec.num_heads, after.spec.num_layers) == expected
    assert_ours(output, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("option", "method", "what"), LATENT_CASES)
def test_latent_attention_and_experts(
    option: str, method: str, what: str, parent: Make, text: Path, tmp_path: Path
) -> None:
    source = parent(option, n_routed_experts=16)
    before = open_checkpoint(source).spec
    more: dict[str, Any] = {} if method == "l1" else {"text": text}
    more |= {"is_refitted": True} if (method, what) in REFITTED else {}
    output = pruned(source, method=method, what=what, ratio=0.3 if what == "layers" else 0.5, **more)
    spec = open_checkpoint(output).spec
    assert spec.experts is not None and before.experts is not None
    found = (spec.experts.num_experts, spec.num_heads, spec.experts.intermediate_size, spec.num_layers)
    expected = {"experts": (8, 4, 24, 3), "heads": (16, 2, 24, 3), "ffn": (16, 4, 12, 3), "layers": (16, 4, 24, 2)}
    assert found == expected[what]
    assert spec.experts.num_groups == before.experts.num_groups
    assert_ours(output, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["ffn", "heads"])
def test_without_a_refit_what_is_left_is_the_parent_with_zeros(what: str, parent: Make, text: Path) -> None:
    source = parent()
    child, model = (
        load_reference(pruned(source, what=what, text=text, ratio=0.5, is_refitted=False)),
        load_reference(source),
    )
    with torch.no_grad():
        for layer, left in zip(model.model.layers, child.model.layers, strict=True):
            own, other = (part.mlp.gate_proj if what == "ffn" else part.self_attn.q_proj for part in (layer, left))
            is_left = (own.weight[:, None] == other.weight[None]).all(-1).any(1)
            assert is_left.sum() == len(own.weight) // 2
            reader = layer.mlp.down_proj if what == "ffn" else layer.self_attn.o_proj
            reader.weight[:, ~is_left] = 0
    np.testing.assert_allclose(logits_of(child), logits_of(model), atol=TOLERANCE)


@pytest.mark.slow
def test_a_refit_is_nearer_to_the_parent_than_none(parent: Make, text: Path) -> None:
    source = parent()
    whole = logits_of(load_reference(source))
    errors = [
        np.square(logits_of(load_reference(pruned(source, text=text, is_refitted=refits))) - whole).mean()
        for refits in (True, False)
    ]
    assert errors[0] < errors[1]


@pytest.mark.slow
def test_channels_that_add_nothing_go_first_and_cost_nothing(parent: Make, text: Path, tmp_path: Path) -> None:
    """Channels with the largest weights, which a text never uses: activations see it, L1 norms don't."""
    source = parent()
    model = load_reference(source)
    dead = np.arange(0, 112, 4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[dead] *= 9
            layer.mlp.up_proj.weight[dead] = 0
    model.save_pretrained(source)
    whole = logits_of(load_reference(source))
    found = {
        method: np.abs(logits_of(load_reference(pruned(source, method=method, **more))) - whole).max()
        for method, more in (("activation", {"text": text, "is_refitted": False}), ("l1", {}))
    }
    assert found["activation"] < TOLERANCE < 0.1 < found["l1"]


@pytest.mark.slow
def test_experts_that_no_token_chooses_go_first_and_cost_nothing(parent: Make, text: Path) -> None:
    source = parent("v3-one-group")
    model = load_reference(source)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias[[1, 6]] = -100.0
    model.save_pretrained(source)
    output = pruned(source, method="experts", text=text)
    spec = open_checkpoint(output).spec
    assert spec.experts is not None and spec.experts.num_experts == 6
    np.testing.assert_allclose(logits_of(load_reference(output)), logits_of(load_reference(source)), atol=TOLERANCE)


@pytest.mark.slow
def test_removed_layers_are_those_that_change_least(parent: Make, text: Path) -> None:
    source = parent()
    model = load_reference(source)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 0
        model.model.layers[1].self_attn.o_proj.weight *= 0
    model.save_pretrained(source)
    output = pruned(source, method="depth", text=text, ratio=0.34)
    assert open_checkpoint(output).spec.num_layers == 2
    np.testing.assert_allclose(logits_of(load_reference(output)), logits_of(load_reference(source)), atol=TOLERANCE)


@pytest.mark.parametrize("quantization", [Quantization.F32, Quantization.F16, Quantization.Q8_0])
@pytest.mark.parametrize("option", ["llama", "qwen2"])
def test_a_gguf_becomes_a_checkpoint(option: str, quantization: Quantization, tmp_path: Path, monkeypatch: Any) -> None:
    directory = make_tokenizer(make_checkpoint(tmp_path / "hf", option, intermediate_size=128))
    source = open_checkpoint(directory)
    tensors = {name: source.read(name).astype(np.float32) for name in source.spec.tensor_shapes()}
    path = write_gguf(tmp_path / "m.gguf", source.spec, tensors, quantization)
    opened = open_checkpoint(path)
    monkeypatch.setattr(type(opened), "write_tokenizer", lambda self, target: source.write_tokenizer(target))
    output = pruned(path, method="l1")
    left = open_checkpoint(output)
    kind = {Quantization.F32: "F32", Quantization.F16: "F16", Quantization.Q8_0: "F16"}[quantization]
    assert left.stored_dtype("model.layers.0.mlp.up_proj.weight") == kind
    assert left.spec.intermediate_size == 96
    assert_ours(output, tmp_path)


@pytest.mark.slow
def test_the_manifest_knows_the_parent(parent: Make, text: Path, tmp_path: Path) -> None:
    source = parent(dtype="float16")
    first = pruned(source, text=text)
    second = pruned(first, method="depth", text=text)
    build(BuildOptions(second, "m", tmp_path / "models", max_seq_len=64))
    manifest = Manifest.load(tmp_path / "models" / "m-engine" / "1")
    assert manifest.provenance == provenance_of(second)
    assert manifest.provenance["step"] == "prune" and manifest.provenance["parent"] == first.name
    assert manifest.provenance["origin"] == provenance_of(first)
    assert manifest.provenance["origin"]["parent"] == "parent"
    whole = open_checkpoint(source)
    for name in whole.spec.tensor_shapes():
        whole.read(name)
    assert manifest.provenance["origin"]["parent_sha256"] == whole.digest()


def test_the_parent_s_own_dtypes_and_files_stay(parent: Make) -> None:
    source = parent(dtype="bfloat16")
    (source / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    output = pruned(source, method="l1")
    config = json.loads((output / "config.json").read_text())
    assert (config["dtype"], config["intermediate_size"]) == ("bfloat16", 84)
    assert open_checkpoint(output).sampling == {"temperature": 0.7}
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert oct(output.stat().st_mode & 0o777) == "0o755"
    assert sorted(path.name for path in output.parent.iterdir() if path.name.startswith(".")) == []


def test_what_a_killed_run_left_is_removed(parent: Make, tmp_path: Path) -> None:
    source = parent()
    leftover = tmp_path / ".out-building-checkpoint~abcdefgh"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    lines: list[str] = []
    prune(PruneOptions(source, tmp_path / "out", method="l1", multiple_of=1), say=lines.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "parent"]
    assert len(lines) == 1 and str(leftover) in lines[0]


KILLED = """
import os, signal, sys
from pathlib import Path
from deepseek_triton.builders import cli

def killed(self, *arguments, **more):
    if "-building-" in str(self):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments, **more)

original = getattr(Path, sys.argv[1])
setattr(Path, sys.argv[1], killed)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["write_text", "rename"])  # the weights or all files are written
def test_kill_minus_9_and_the_same_command(call: str, parent: Make, tmp_path: Path) -> None:
    words = ["prune", str(parent()), "--output", str(tmp_path / "out"), "--method=l1", "--multiple-of=1", "-q"]
    process = subprocess.run([sys.executable, "-c", KILLED, call, *words], check=False)
    assert process.returncode == -9 and not (tmp_path / "out").exists()
    assert len([path for path in tmp_path.iterdir() if "-building-" in path.name]) == 1
    assert cli.main(words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "parent"]
    assert open_checkpoint(tmp_path / "out").spec.num_layers == open_checkpoint(tmp_path / "parent").spec.num_layers


def test_what_is_left_is_a_multiple(parent: Make) -> None:
    sizes = [
        open_checkpoint(pruned(parent(), method="l1", ratio=ratio, multiple_of=multiple)).spec.intermediate_size
        for ratio, multiple in ((0.2, None), (0.2, 32), (0.2, 16), (0.31, 1))
    ]
    assert sizes == [64, 96, 96, 77]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 0.0}, "ratio is 0.0, must lie between 0 and 1"),
    ({"ratio": 1.0}, "ratio is 1.0, must lie between 0 and 1"),
    ({"ratio": float("nan")}, "ratio is nan, must lie between 0 and 1"),
    ({"ratio": -0.2}, "ratio is -0.2, must lie between 0 and 1"),
    ({"ratio": float("inf")}, "ratio is inf, must lie between 0 and 1"),
    ({"method": "experts"}, "is a dense model, without experts to remove"),
    ({"method": "depth", "what": "ffn"}, "method depth removes layers, not ffn"),
    ({"method": "l1", "text": Path("text.txt")}, "reads no text"),
    ({"method": "l1", "is_refitted": True}, "refit is for method activation"),
    ({"method": "activation", "what": "layers", "is_refitted": True}, "refit is for method activation"),
    ({"multiple_of": 0}, "multiple-of is 0, must be at least 1"),
    ({"method": "l1", "multiple_of": 128}, "ratio 0.25 of 112 FFN channels removes none|raise --ratio"),
    ({"method": "l1", "ratio": 0.99, "multiple_of": 64}, "ratio 0.99 of 112 FFN channels leaves none"),
    ({"method": "l1", "what": "heads", "ratio": 0.1}, "ratio 0.1 of 2 groups of heads removes none"),
    ({"text": Path("nowhere.txt")}, "nowhere.txt: No such file"),
    ({"checkpoint": Path("nowhere")}, "nowhere does not exist"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_can_t_be_done_is_told_and_leaves_nothing(
    options: dict[str, Any], message: str, parent: Make, tmp_path: Path
) -> None:
    source = parent()
    output = tmp_path / "out"
    values: dict[str, Any] = {"checkpoint": source, "multiple_of": 1, "ratio": 0.25, **options}
    with pytest.raises(BuildError, match=message):
        prune(PruneOptions(output=output, **values))
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_an_output_that_exists_is_left_alone(parent: Make, tmp_path: Path) -> None:
    source = parent()
    (tmp_path / "out").mkdir()
    for output, message in ((tmp_path / "out", "exists"), (source / "out", "lies among the files")):
        with pytest.raises(BuildError, match=message):
            prune(PruneOptions(source, output, method="l1", multiple_of=1))


def test_too_few_experts_for_a_token_are_refused(parent: Make, text: Path) -> None:
    with pytest.raises(BuildError, match="what is left is no model: num_experts_per_tok is 3"):
        pruned(parent("v2"), method="experts", text=text, ratio=0.8)


def test_the_command(parent: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = parent(), tmp_path / "out"
    command = ["prune", str(source), "--output", str(output), "--method", "l1", "--ratio", "0.4"]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == open_checkpoint(output).spec.num_parameters() < told["parent_parameters"]
    assert cli.main(command) == 1
    assert capsys.readouterr().err == f"error: {output} exists; give an --output that doesn't, or remove it\n"
