"""Evaluation: its figures compared with independent ones, its files, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.cli import main
from deepseek_triton.builders.fp8.calibrate import calibrate
from deepseek_triton.builders.fp8.quality.evaluate import (
    EvaluationError,
    Final,
    FloatSource,
    compare,
    module_errors,
    run_model,
    text_windows,
)
from deepseek_triton.builders.fp8.quality.graph_weights import Artefact, ArtefactError
from deepseek_triton.builders.fp8.quantize import quantized_graph
from deepseek_triton.builders.fp8.recipe import RECIPES
from deepseek_triton.builders.fp8.texts.calibration_text import load_or_calibrate
from deepseek_triton.builders.graph.decoder import build_graph
from tests.builders.fp8.test_calibrate import write_byte_tokenizer
from tests.support.checkpoints import load_reference, make_checkpoint

Array = np.ndarray[Any, Any]
TEXT = "It was the habit of the lighthouse keeper to count the ships twice, once for the ledger. " * 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("evaluate") / "checkpoint", "llama")
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def windows() -> list[Array]:
    return text_windows(np.random.default_rng(1).integers(0, 319, 400), 100, 330, 320)


@pytest.fixture(scope="module")
def artefact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    directory = tmp_path_factory.mktemp("artefact")
    calibration = calibrate(open_checkpoint(checkpoint), [np.random.default_rng(2).integers(0, 319, 200)])
    recipe = RECIPES["nearest"]
    graph, _ = quantized_graph(open_checkpoint(checkpoint), recipe, calibration, directory, max_seq_len=100)
    return Artefact(graph)


@pytest.mark.slow
def test_the_float_model_has_transformers_perplexity_and_accuracy(checkpoint: Path, windows: list[Array]) -> None:
    torch = pytest.importorskip("torch")
    model, losses, hits = load_reference(checkpoint), [], []
    with torch.no_grad():
        for window in windows:
            logits = model(torch.tensor(window)[None]).logits[0, :-1]
            targets = torch.tensor(window[1:])
            losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
            hits.append(logits.argmax(-1) == targets)
    source = open_checkpoint(checkpoint)
    final = run_model(FloatSource(source), source.spec, windows)
    quality = compare(final, final, windows)
    assert quality.num_tokens == 330
    assert quality.float_perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-3)
    assert quality.float_accuracy == pytest.approx(float(torch.cat(hits).float().mean()))
    assert (quality.perplexity_ratio, quality.agreement, quality.worst_kl) == (1.0, 1.0, 0.0)


def test_divergence_and_agreement_are_those_of_the_distributions(windows: list[Array]) -> None:
    random = np.random.default_rng(0)
    head = random.standard_normal((320, 16)).astype(np.float32)
    hidden = [random.standard_normal((len(w), 16)).astype(np.float32) for w in windows]
    moved = [h + np.float32(0.2) * random.standard_normal(h.shape).astype(np.float32) for h in hidden]
    quality = compare(Final(tuple(hidden), head), Final(tuple(moved), head), windows)

    def log_probabilities(states: list[Array]) -> Array:
        logits = np.concatenate([h[:-1] for h in states]).astype(np.float64) @ head.T.astype(np.float64)
        result: Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return result

    p, q = log_probabilities(hidden), log_probabilities(moved)
    targets = np.concatenate([w[1:] for w in windows])
    rows, kl = np.arange(len(targets)), (np.exp(p) * (p - q)).sum(axis=1)
    assert quality.mean_kl == pytest.approx(kl.mean(), rel=1e-3) and quality.worst_kl == pytest.approx(
        kl.max(), rel=1e-3
    )
    assert quality.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert quality.agreement == pytest.approx(np.mean(p.argmax(1) == q.argmax(1)))
    assert quality.perplexity == pytest.approx(np.exp(-q[rows, targets].mean()), rel=1e-4)
    assert quality.perplexity_ratio == pytest.approx(np.exp((p - q)[rows, targets].mean()), rel=1e-4)
    kept = np.mean(q.argmax(1) == targets) / max(np.mean(p.argmax(1) == targets), 1e-9)
    assert quality.accuracy_kept == pytest.approx(kept, nan_ok=True)


@pytest.mark.slow
def test_errors_by_module_grow_along_the_quantised_model(
    checkpoint: Path, artefact: Artefact, windows: list[Array]
) -> None:
    source = open_checkpoint(checkpoint)
    errors = module_errors(FloatSource(source), artefact, source.spec, windows[0])
    assert [e.module for e in errors[:2]] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert len(errors) == 21 and all(e.precision == "fp8" for e in errors)
    assert all(0.01 < e.own < 0.3 for e in errors)
    assert errors[0].num_bytes == 64 * 64 + 2 * 64
    later = errors[7:]
    assert np.mean([e.accumulated for e in later]) > 1.2 * np.mean([e.own for e in later])
    nothing = module_errors(FloatSource(source), FloatSource(source), source.spec, windows[0])
    assert all(e.own < 1e-5 and e.accumulated < 1e-5 and e.precision == "network" for e in nothing)


def test_a_text_is_cut_into_windows_that_predict_what_was_asked() -> None:
    ids = np.arange(1000)
    for length, tokens in ((100, 330), (512, 5), (50, 10_000), (1000, 999)):
        found = text_windows(ids, length, tokens, 1000)
        assert max(map(len, found)) <= length
        assert sum(len(w) - 1 for w in found) == min(
            tokens, sum(len(ids[i : i + length]) - 1 for i in range(0, 1000, length))
        )
    with pytest.raises(EvaluationError, match="has 10 tokens"):
        text_windows(np.arange(10), 100, 100, 1000)
    with pytest.raises(EvaluationError, match="token 999 is outside"):
        text_windows(ids, 100, 100, 500)


def test_an_artefact_gives_its_own_numbers(checkpoint: Path, artefact: Artefact, tmp_path: Path) -> None:
    source = open_checkpoint(checkpoint)
    assert artefact.precision_of("model.layers.0.mlp.up_proj") == "FLOAT8E4M3FN"
    assert artefact.precision_of("lm_head") == "FLOAT16"
    assert artefact.stored_bytes("model.layers.0.mlp.up_proj") == 64 * 112 + 2 * 112
    float_path = build_graph(source.spec, source.read, tmp_path, max_seq_len=16)
    exact = Artefact(float_path)
    for name in source.spec.tensor_shapes():
        assert np.array_equal(exact.read(name), source.read(name)), name
    assert exact.quantized("model.layers.0.mlp.up_proj") is None
    assert exact.num_bytes > 2 * artefact.num_bytes


def test_what_is_no_artefact_of_this_checkpoint_is_refused(artefact: Artefact, tmp_path: Path) -> None:
    other = open_checkpoint(make_checkpoint(tmp_path / "other", "llama-head-dim"))
    with pytest.raises(ArtefactError, match="not built from this checkpoint"):
        artefact.check(other.spec)
    with pytest.raises(ArtefactError, match="No such file"):
        Artefact(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"no protobuf")
    (tmp_path / "model.onnx.data").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"not an ONNX graph|not a decoder graph"):
        Artefact(tmp_path / "model.onnx")


# ---- the command


def command(*arguments: str | Path) -> int:
    return main(["evaluate", *map(str, arguments)])


@pytest.mark.slow
def test_the_command_evaluates_an_artefact_and_draws_it(
    checkpoint: Path, artefact: Artefact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    output = tmp_path / "report"
    assert (
        command(checkpoint, "--text", text, "--artefact", artefact.path.parent, "--window", "100", "--output", output)
        == 0
    )
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "nothing to be kept" in printed and "mlp.down_proj" in printed
    assert "nan" not in printed
    result = json.loads((output / "quality.json").read_text())
    assert result["artefact_bytes"] == artefact.num_bytes and len(result["modules"]) == 21
    assert 0 < result["quality"]["mean_kl"] < 1
    assert result["quality"]["accuracy_kept"] is None, "the float model predicts no token of the text"
    assert (output / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_quantises_first_where_no_artefact_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, ranges = tmp_path / "text.txt", tmp_path / "ranges.json"
    text.write_text(TEXT)
    load_or_calibrate(open_checkpoint(checkpoint), ranges, text, lambda what, done, total: None)
    before = ranges.read_bytes()
    assert command(checkpoint, "--text", text, "--recipe", "nearest", "--ranges", ranges, "--window", "64") == 0
    assert "top-1 agreement" in capsys.readouterr().out
    assert ranges.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--text": "none.txt"}, "No such file"),
        ({"--text": "short.txt"}, "has 5 tokens, at least 64"),
        ({"--artefact": "none"}, "No such file"),
        ({"--tokens": "0"}, "tokens is 0"),
        ({"--window": "1"}, "window is 1"),
    ],
)
def test_a_fault_is_told_in_one_line(
    change: dict[str, str], message: str, checkpoint: Path, artefact: Artefact, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("short.txt").write_text("short")
    options = {"--text": "text.txt", "--artefact": str(artefact.path), **change}
    assert command(checkpoint, *(word for pair in options.items() for word in pair)) == 1
    error = capsys.readouterr().err.split("\r")[-1]
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
